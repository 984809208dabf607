"""Files of strangers: regular ones of a stated size, read without waiting for what lies behind a link or a pipe."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import BinaryIO, TextIO

from utils.errors import DataError

MIB = 1 << 20


def open_regular(path: str | Path, limit: int | None = None, what: str = "file") -> BinaryIO:
    """Open a regular file for reading; a pipe, a device or a folder is refused at once.

    Args:
        path: The file; links are followed.
        limit: Most bytes that it may have.
        what: What it is, for the message about the limit.

    Raises:
        DataError: Missing, unreadable, of another kind, or larger than ``limit``.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)       # a pipe without a writer: no wait
    except (OSError, ValueError) as error:                                             # ValueError: a null byte
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    info = os.fstat(descriptor)
    problem = None
    if not stat.S_ISREG(info.st_mode):
        problem = "is not a file but a " + _kind(info.st_mode)
    elif limit is not None and info.st_size > limit:
        problem = f"{info.st_size / MIB:,.1f} MiB: a {what} may have {limit / MIB:,.3g} MiB at most"
    if problem:
        os.close(descriptor)
        raise DataError(f"{path}: {problem}")
    return os.fdopen(descriptor, "rb")


def read_regular(path: str | Path, limit: int, what: str = "file") -> bytes:
    """All bytes of a regular file, at most ``limit``, even if it grows meanwhile. Raises DataError as above."""
    with open_regular(path, limit, what) as file:
        try:
            return file.read(limit)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def open_append(path: str | Path) -> TextIO:
    """Open a file to add lines to it, made if need be; what lies there must be a file of its own.

    Raises:
        DataError: A link, which could lead anywhere, or a pipe. OSError: A folder; no room.
    """
    try:
        how = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, how, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DataError(f"{path}: is a link, lines are added to a file of its own only; remove it") from None
        if error.errno == errno.ENXIO:                       # a pipe that nobody reads
            raise DataError(f"{path}: is not a file but a pipe") from None
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise DataError(f"{path}: is not a file but a {_kind(mode)}")
    return os.fdopen(descriptor, "a")


def read_json(path: str | Path):
    """What a JSON file of any size holds. Raises DataError: no regular file. ValueError, RecursionError: no JSON."""
    with open_regular(path) as file:
        return json.load(file)


def read_lines(path: str | Path) -> list[str]:
    """Lines of a text with their ends; what is no UTF-8 is replaced. Raises DataError: no regular file."""
    with open_regular(path) as file:
        return file.read().decode(errors="replace").splitlines(keepends=True)


def json_object(text: str) -> dict | None:
    """The JSON object that a line holds; None where it holds none, such as half a line of a killed process."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_settings(path: Path) -> dict:
    """The settings in the JSON file that describes a network or pipeline. Raises DataError: missing, or no object."""
    try:
        settings = json.loads(read_regular(path, MIB, "description of a model"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise DataError(f"{path}: cannot be read: it must hold settings by name")
    return settings


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFCHR: "device", stat.S_IFBLK: "device",
             stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "special file")
