"""An output that could not be written is refused before the work, not after it."""

import os
import tempfile
from pathlib import Path

from utils.errors import UserError


def check_writable(path: str | Path, flag: str) -> None:
    """Refuse ``path``, which ``flag`` named, where nothing can be made or renamed to it.

    Raises:
        UserError: No file can be made in its folder, or in the one that this would be made in.
    """
    whole = Path(path).absolute()
    folder = next(each for each in (*whole.parents, whole) if os.path.lexists(each))
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{flag} {path}: no file can be made in {folder} ({error.strerror}); name another place"
                        ) from None


def check_appendable(path: str | Path, flag: str) -> None:
    """The same for a file that is only appended to: where it exists its folder does not matter."""
    if not os.path.exists(path):
        check_writable(path, flag)
    elif not os.access(path, os.W_OK):
        raise UserError(f"{flag} {path} may not be written to; name another file")
