import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.errors import UserError
from utils.names import safe_name
from utils.text import LineFormatter, escape_control


@pytest.mark.parametrize("name", ["church_outdoor", "a/b", "é", "a..b", "a b"])
def test_names_below_a_folder(name):
    assert safe_name("--doc", name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/x", "a/../../x", "a\nb", "a\x1b[2J", "x\0", "\udcff",
                                  "x" * 300, "‮gpj.exe", None])
def test_names_that_leave_it_or_forge_a_line(name):
    with pytest.raises(UserError, match="^--doc ") as error:
        safe_name("--doc", name)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["a/b", "a/", "./a"])
def test_one_part(name):
    with pytest.raises(UserError, match="single name"):
        safe_name("data.category", name, one_part=True)
    assert safe_name("data.category", "tower", one_part=True) == "tower"


@given(st.text())
def test_escaped_text_is_one_printable_line(text):
    escaped = escape_control(text)
    assert len(escaped.splitlines()) <= 1 and not any(ord(char) < 32 or ord(char) == 127 for char in escaped)
    assert escaped.encode() is not None and escape_control(escaped) == escaped


def test_a_message_cannot_forge_a_line_of_the_log():
    record = logging.LogRecord("x", logging.INFO, "", 0, "read %s", ("a\n12:00:00 step 7 loss 0",), None)
    assert LineFormatter("%(message)s").format(record) == r"read a\n12:00:00 step 7 loss 0"
    assert str(UserError("one\ntwo\x1b[2J")) == r"one two\x1b[2J"
