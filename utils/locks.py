"""Locks that the system drops when their process dies, however it dies."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import DataError, UserError

log = logging.getLogger(__name__)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this job; the system drops the lock when the job dies, however it dies.

    The lock file lies beside the folder, so that the folder itself can be renamed. Forked workers do not inherit the
    lock: a job may be started again while they still notice that their parent is gone.

    Raises:
        UserError: Another job holds it.
        DataError: The lock file is a link.
    """
    descriptor = _open_lock(folder.with_name(f".{folder.name}.lock"))
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{folder} is in use by another job; choose another name, or wait for it") from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[int]:
    """Hold the lock file ``path``; others wait here. The system frees it when the process dies, however it dies.

    Yields the descriptor: a forked worker that may outlive its parent has to close it.

    Raises:
        DataError: The lock file is a link.
    """
    descriptor = _open_lock(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that is %s (lock %s)", what, path)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    """A descriptor of ``path``, made if need be; its content is left alone, and no link is followed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise DataError(f"{path}: is a link, a lock must be a file of its own; remove it") from None
