"""Errors that are the user's to mend: scripts print them as one line and exit with their ``code``."""


from utils.text import escape_control


class UserError(Exception):
    """A wrong request: what was given, what is allowed, what to do. Exit code 2.

    Its text is one line: what a file name or another program's message brings along cannot add lines.
    """

    code = 2
    on_all_ranks = False             # raised by every rank alike, so that one of them prints it

    def __str__(self):
        return escape_control(" ".join(super().__str__().splitlines()))


class ConfigError(UserError):
    """A configuration that cannot be used. Exit code 2."""


class DataError(UserError):
    """A data set or file that is missing, broken or foreign. Exit code 3."""

    code = 3


class SaveError(DataError):
    """The newest state could not be written; an older one is whole. Exit code 3."""


class DivergedError(UserError):
    """Training or sampling gave numbers that are not finite. Exit code 4."""

    code = 4


class LostRank(UserError):
    """Another process of the job is gone. Exit code 1, or 128 + the signal that ended it."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


class Interrupted(UserError):
    """Stopped by a signal, training after it has saved. Exit code 128 + signal number."""

    on_all_ranks = True

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.code = 128 + signum


def choose(registry, name, what: str):
    """``registry[name]``, or a UserError that names the sorted known ones."""
    if name not in registry:
        raise UserError(f"{what} {name!r} is unknown; known: {', '.join(sorted(registry))}")
    return registry[name]
