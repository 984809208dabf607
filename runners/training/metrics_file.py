"""metrics.jsonl, read: it may be that of a killed run, or come with a stranger's folder."""

import json
from pathlib import Path

from utils.files import open_regular

NUMBERS = ("loss", "loss_base", "grad_norm", "validation_loss", "images_per_s")
LARGEST = 2**63                                      # of whole numbers; floats may be anything


def read_metrics(path: Path) -> list[dict]:
    """The lines that a run has written; others, such as half a line of a killed process, are passed over.

    Raises:
        DataError: Unreadable, or no regular file.
    """
    if not path.exists():
        return []
    with open_regular(path) as file:
        texts = file.read().decode(errors="replace").splitlines()
    return [line for line in map(_parse, texts) if line is not None]


def _parse(text: str) -> dict | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int) or not _is_number(line["step"]):
        return None
    return line if all(line.get(key) is None or _is_number(line[key]) for key in NUMBERS) else None


def _is_number(value) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)
                                        and abs(value) < LARGEST)
