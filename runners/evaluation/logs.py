"""What is written down of a result: the line on the screen, SA-DPM's line in a log, and one JSON object beside it."""

import json
import logging
import os
import platform
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from functions.fid_interval import LEAST_IMAGES
from runners.distributed import rank, world_size
from runners.evaluation.outputs import check_output
from utils.errors import UserError
from utils.text import escape_control
from utils.writable import check_appendable

log = logging.getLogger(__name__)

def count_name(num_images: int) -> str:
    """50000 -> "FID-50k", 1797 -> "FID-1797": the count is part of an FID's name."""
    return f"FID-{num_images // 1000}k" if num_images % 1000 == 0 else f"FID-{num_images}"


def summary(results: dict) -> str:
    """The numbers, one on a line, for people."""
    lines = [f"{results['name'] if key == 'fid' else key:20} {value:.6g}" for key, value in results.items()
             if isinstance(value, float)]
    if "fid_interval_95" in results:
        interval = results["fid_interval_95"]
        words = "{:.6g} to {:.6g}".format(*interval) if interval else \
            f"none: it needs {LEAST_IMAGES} images or more, whose features differ"
        lines.append(f"{'95% interval':20} {words}")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Of everything whose change could move a digit."""
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "pytorch-fid", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def json_log(fid_log: str | Path) -> Path:
    """Where the JSON objects of a log go: ``fid.txt`` -> ``fid.jsonl``; other names keep all of themselves.

    ``lamda0.5`` and ``lamda0.1`` are two logs: what follows their dot is no suffix.

    Raises:
        UserError: The name is the JSON file's own.
    """
    fid_log = Path(fid_log)
    if fid_log.suffix == ".jsonl":
        raise UserError(f"--fid_log {fid_log}: name the text file, such as fid.txt; its .jsonl follows")
    return fid_log.with_suffix(".jsonl") if fid_log.suffix == ".txt" else fid_log.with_name(fid_log.name + ".jsonl")


def check_log(fid_log: str | Path, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse, before any work, a log of results that could not be appended to after it.

    Raises:
        UserError: One of its two files is an input or a folder, may not be written to, or has another's name.
    """
    for path in (fid_log, json_log(fid_log)):
        check_output(path, "--fid_log", inputs=inputs, ours=lambda path: True)
        check_appendable(path, "--fid_log")


def append_log(fid_log: str | Path, checkpoint_path: str | Path, results: dict, details: dict) -> None:
    """Append SA-DPM's line to ``fid_log`` and one JSON object to ``json_log`` of it; rank 0 only.

    Args:
        checkpoint_path: Its last two parts name the run and the weights in the line.
        results: Of ``Evaluation.results``.
        details: How the images were made: whatever is needed to make them again.
    """
    if rank() > 0:
        return
    fid_log, checkpoint = Path(fid_log), "/".join(Path(checkpoint_path).parts[-2:])
    device = details.get("device", "cpu")
    entry = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "checkpoint": checkpoint, **details, **results,
             "world_size": world_size(), "threads": torch.get_num_threads(), "versions": versions(),
             "machine": torch.cuda.get_device_name(device) if str(device).startswith("cuda") else platform.machine()}
    objects = json_log(fid_log)
    if not fid_log.parent.exists():
        log.info("making the folder %s for %s", fid_log.parent, fid_log.name)
        fid_log.parent.mkdir(parents=True, exist_ok=True)
    if "fid" in results:
        _append(fid_log, f"Checkpoint {escape_control(checkpoint)}  --> FID {results['fid']}\n")
    _append(objects, json.dumps(entry) + "\n")


def _append(path: Path, line: str) -> None:
    """In one write, so that lines of concurrent jobs do not mix."""
    with open(path, "a") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
