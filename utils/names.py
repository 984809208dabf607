"""Names that become paths, checked in one place."""

from pathlib import PurePosixPath

from utils.errors import UserError
from utils.text import escape_control

LONGEST = 200               # bytes of one part; file systems take 255, and endings are appended


def safe_name(what: str, name: str, *, one_part: bool = False) -> str:
    """A relative path that stays below whatever folder it is joined to.

    Args:
        what: The flag or key that gave it, for the message.
        name: What was given.
        one_part: Refuse folders within the name, too.

    Returns:
        ``name``, unchanged.

    Raises:
        UserError: It is empty, absolute, has ``..``, control characters or bytes that are no UTF-8, or is too long.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or parts[0].startswith("/") or ".." in parts:
        raise UserError(f"{what} {name!r} must be a relative name without '..'")
    if one_part and (len(parts) > 1 or name != parts[0]):
        raise UserError(f"{what} {name!r} must be a single name without '/'")
    if escape_control(name) != name:
        raise UserError(f"{what} {name!r} must be printable text without control characters")
    if max(len(part.encode()) for part in parts) > LONGEST:
        raise UserError(f"{what} {name[:40]!r}... is too long: at most {LONGEST} bytes between two '/'")
    return name
