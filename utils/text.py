"""Text from strangers, made safe to print: one line of a log is one line, whatever a file name or a comment holds."""

import logging
import unicodedata

# Cc: control characters; Cf: invisible ones, among them those that turn the direction of text; Zl, Zp: separators of
# lines and paragraphs; Cs: half characters, which stand for bytes of a file name that are not UTF-8.
_ESCAPED = {"Cc", "Cf", "Zl", "Zp", "Cs"}


def escape_control(text: str) -> str:
    r"""``text`` with every newline, control and invisible character written as ``\n``, ``\x1b``, ``\u2028``, ..."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(char) if unicodedata.category(char) in _ESCAPED else char for char in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape", "backslashreplace").decode("ascii")


class LineFormatter(logging.Formatter):
    """A formatter whose messages cannot forge further lines of the log; tracebacks keep theirs."""

    def formatMessage(self, record):
        record.message = escape_control(record.message)
        return super().formatMessage(record)
