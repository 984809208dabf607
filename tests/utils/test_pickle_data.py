"""Pickles read as data: plain values come out, everything else ends the reading, and nothing is ever run."""

import collections
import io
import os
import pickle
import pickletools
import struct

import pytest

from utils.pickle_data import Record, plain_set, read_pickle


def read(value, names=None, protocol=4):
    return read_pickle(io.BytesIO(pickle.dumps(value, protocol=protocol)), names or {})


def test_plain_values_come_back():
    shared = [1, 2]
    value = {"numbers": (1, -5, 300, 70_000, 2**40, 1.5), "text": "ä" * 300, "bytes": b"\0\xff", "none": None,
             "flags": [True, False], "nested": [[], {}, (), (1,), (1, 2), (1, 2, 3), shared, shared]}
    for protocol in (3, 4, 5):
        result = read(value, protocol=protocol)
        assert result == value and list(map(type, result["nested"])) == list(map(type, value["nested"]))
    assert read({1, 2}) == {1, 2}
    assert result["nested"][-1] is result["nested"][-2]


def test_several_pickles_in_a_row_leave_the_file_behind_them():
    file = io.BytesIO(pickle.dumps(1) + pickle.dumps([2]) + b"rest")
    assert (read_pickle(file, {}), read_pickle(file, {}), file.read()) == (1, [2], b"rest")


def test_admitted_names_are_the_callers_own():
    value = collections.OrderedDict(a=1)
    assert read(value, {"collections.OrderedDict": dict}) == {"a": 1}
    with pytest.raises(ValueError, match="it asks for collections.OrderedDict"):
        read(value)


class Payload:
    """Makes a folder if anybody unpickles it."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_code_is_named_and_not_run(tmp_path, protocol):
    with pytest.raises(ValueError, match=rf"it asks for {os.mkdir.__module__}.mkdir|the instruction"):
        read({"a": Payload(tmp_path / "ran")}, protocol=protocol)
    assert not list(tmp_path.iterdir())


def program(*parts):
    """A pickle written by hand: instruction names and raw bytes."""
    codes = {op.name: op.code.encode("latin-1") for op in pickletools.opcodes}
    return io.BytesIO(b"".join(codes[part] if isinstance(part, str) else part for part in parts))


TEXT = (b"\x8c\x01", b"x")


class Box(Record):
    pass


@pytest.mark.parametrize("parts, message", [
    (("BINBYTES8", struct.pack("<Q", 100 * 2**30), b"abc", "STOP"), "expected 107374182400 bytes"),
    (("BYTEARRAY8", struct.pack("<Q", 100 * 2**30), b"abc", "STOP"), "expected 107374182400 bytes"),
    (("LONG4", struct.pack("<i", 2**30), b"abc", "STOP"), "not enough data"),
    (("EXT1", b"\x05", "STOP"), "the instruction EXT1"),
    (("GLOBAL", b"a\nbox\n", "EMPTY_DICT", "BUILD", "STOP"), "it sets the state of a Name"),
    (("EMPTY_DICT", "EMPTY_DICT", "BUILD", "STOP"), "it sets the state of a dict"),
    (("EMPTY_LIST", "EMPTY_TUPLE", "REDUCE", "STOP"), "it calls what is no function"),
    (("GLOBAL", b"a\nbox\n", "EMPTY_LIST", "REDUCE", "STOP"), "it calls what is no function"),
    (("EMPTY_TUPLE", "NONE", "APPEND", "STOP"), "it adds to a tuple as if it were a list"),
    (("EMPTY_DICT", "MARK", "NONE", "SETITEMS", "STOP"), "argument 2 is shorter|zip"),
    (("NONE", "BINPERSID", "STOP"), "it refers to something outside"),
    (("BINGET", b"\x07", "STOP"), "it is broken"),
    (("TUPLE3", "STOP"), "it takes more than it has"),
    (("EMPTY_LIST",), "pickle exhausted before seeing STOP"),
    ((b"\xff",), "unknown|opcode"),
    ((), "exhausted"),
])
def test_what_no_plain_value_needs_ends_the_reading(parts, message):
    with pytest.raises(ValueError, match=message):
        read_pickle(program(*parts), {"a.box": Box})


@pytest.mark.parametrize("end", [("NONE", "SETITEM"), ("TUPLE1", "REDUCE")])
def test_a_key_nested_200_000_deep_is_never_hashed(end):
    deep = (b")" + b"\x85" * 200_000,)                         # EMPTY_TUPLE, then TUPLE1 again and again
    begin = ("EMPTY_DICT",) if end[0] == "NONE" else ("GLOBAL", b"a\nset\n")
    with pytest.raises(ValueError, match="neither text nor a number"):
        read_pickle(program(*begin, *deep, *end, "STOP"), {"a.set": plain_set})


def test_a_put_at_a_huge_place_takes_no_memory():
    file = program("EMPTY_LIST", "LONG_BINPUT", struct.pack("<I", 2**32 - 1), "STOP")
    assert read_pickle(file, {}) == []


def test_a_record_gets_its_state_and_nothing_else():
    file = program("GLOBAL", b"a\nbox\n", "EMPTY_TUPLE", "NEWOBJ", "EMPTY_DICT", *TEXT, "NONE", "SETITEM", "BUILD",
                   "STOP")
    box = read_pickle(file, {"a.box": Box})
    assert type(box) is Box and vars(box) == {"state": {"x": None}}
