"""Files that are either whole or absent: write to a temporary name beside the target, fsync, rename."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; on success it becomes ``path``, on error it is removed.

    The folder is created. The temporary name starts with a dot and ends in ``.tmp``, so no reader takes it for data.
    ``durable=False`` skips waiting for the disk: a power cut may then lose the file, a killed process does not.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
