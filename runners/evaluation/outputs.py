"""No output is ever an input, and a file that this program did not write is never replaced without being told to."""

from collections.abc import Callable, Iterable
from pathlib import Path

from utils.errors import UserError


def check_output(path: str | Path, flag: str, *, inputs: Iterable[str | Path] = (), ours: Callable[[Path], bool],
                 overwrite: bool = False) -> None:
    """Refuse to write ``path``, before any work.

    Args:
        path: The file that will be replaced.
        flag: What named it, for the message.
        inputs: Files and folders that the command reads.
        ours: Whether an existing file was written by this program for the same purpose.
        overwrite: Replace any file that is no input.

    Raises:
        UserError: It is an input, a folder, or a file of someone else's.
    """
    path = Path(path)
    if any(path.resolve() == Path(source).resolve() for source in inputs):
        raise UserError(f"{flag} {path} is an input of this command; name another file")
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; name a file")
    if path.exists() and not overwrite and not ours(path):
        raise UserError(f"{flag} {path} exists and was not made by this program; name another file, or --overwrite")
