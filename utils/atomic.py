"""Files that are either whole or absent: write to a temporary name beside the target, fsync, rename."""

import json
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; on success it becomes ``path``, on error it is removed.

    The folder is created. The temporary name starts with a dot and ends in ``.tmp``, so no reader takes it for data;
    what a killed process leaves of these is for ``remove_leftovers``.
    ``durable=False`` skips waiting for the disk: a power cut may then lose the file, a killed process does not.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        if durable:
            _fsync(temporary)
        os.replace(temporary, path)
        if durable:
            _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | Path, write: Callable, durable: bool = True) -> None:
    """Call ``write(binary_file)`` and publish the result under ``path`` in one step."""
    with atomic_path(path, durable) as temporary, open(temporary, "wb") as file:
        write(file)


def write_text(path: str | Path, text: str) -> None:
    atomic_write(path, lambda file: file.write(text.encode()))


def write_json(path: str | Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of killed processes in ``folder``, which the caller has locked, and not below: runs
    of a study may lie there."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", path.name):
            path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
