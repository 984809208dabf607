"""One job for each folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this job; the system drops the lock when the job dies, however it dies.

    The lock file lies beside the folder, so that the folder itself can be renamed. Forked workers do not inherit the
    lock: a job may be started again while they still notice that their parent is gone.

    Raises:
        UserError: Another job holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{folder} is in use by another job; choose another name, or wait for it") from None
        yield
