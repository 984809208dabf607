"""metrics.jsonl, read: it may be that of a killed run, or come with a stranger's folder."""

from pathlib import Path

from utils.files import json_object, read_lines

NUMBERS = ("loss", "loss_base", "grad_norm", "validation_loss", "images_per_s")
LARGEST = 2**63                                      # of whole numbers; floats may be anything


def read_metrics(path: Path) -> list[dict]:
    """The lines that a run has written; others, such as half a line of a killed process, are passed over.

    Raises:
        DataError: Unreadable, or no regular file.
    """
    if not path.exists():
        return []
    lines = (json_object(text) for text in read_lines(path))
    return [line for line in lines if line is not None and _is_of_a_run(line)]


def _is_of_a_run(line: dict) -> bool:
    step = line.get("step")
    return isinstance(step, int) and _is_number(step) and all(
        line.get(key) is None or _is_number(line[key]) for key in NUMBERS)


def _is_number(value) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)
                                        and abs(value) < LARGEST)
