"""Read a pickle as data. There is no unpickler here: what the bytes say is looked at, never run.

A pickle is a program for a small stack machine. This one knows the instructions that plain values need, and "call the
global NAME with these arguments" only for names that the caller explains, by a function that builds a plain record.
Everything else, a name as much as an instruction, ends the reading. No claimed size is believed: bytes that are not
there cannot be asked for.
"""

import pickletools
from collections.abc import Callable, Mapping
from typing import BinaryIO


class Record:
    """What a caller's function returns for an object that has a state: BUILD, and nothing else, sets ``state``."""

    state = None


class Name:
    """A global: what the caller says that it means."""

    def __init__(self, meaning):
        self.meaning = meaning


class _Machine:
    def __init__(self, names: Mapping, outside: Callable):
        self.names, self.outside = names, outside
        self.stack: list = []
        self.below: list[list] = []                            # stacks that a MARK has put aside
        self.memo: list | dict = {}

    def top(self) -> list:
        """The items above the last mark, which is taken off."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def take(self, count: int) -> list:
        if len(self.stack) < count:
            raise ValueError("it takes more than it has put down")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def look_up(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"it asks for {name}")
        self.stack.append(Name(self.names[name]))

    def call(self) -> None:
        name, arguments = self.take(2)
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise ValueError("it calls what is no function")
        self.stack.append(name.meaning(*arguments))

    def build(self) -> None:
        (state,) = self.take(1)
        if not isinstance(self.stack[-1], Record):
            raise ValueError(f"it sets the state of a {type(self.stack[-1]).__name__}")
        self.stack[-1].state = state

    def add(self, kind: type, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not kind:
            raise ValueError(f"it adds to a {type(target).__name__} as if it were a {kind.__name__}")
        if kind is dict:
            target.update(plain_dict(zip(items[::2], items[1::2], strict=True)))
        else:
            (target.extend if kind is list else target.update)(items if kind is list else plain_set(items))

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []


def plain_dict(items=()) -> dict:
    """What ``collections.OrderedDict`` and its kin mean: a dictionary, from pairs."""
    pairs = [(key, value) for key, value in items]
    plain_set(key for key, _ in pairs)
    return dict(pairs)


def plain_set(items=()) -> set:
    """What ``set`` means. Hashing a tuple that is nested 150,000 deep would overflow the stack."""
    items = list(items)
    if not all(isinstance(item, str | bytes | int | float | None) for item in items):
        raise ValueError("it holds a key that is neither text nor a number")
    return set(items)


def _push(machine: _Machine, value) -> None:
    machine.stack.append(value)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NEW = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
_GIVEN = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
          "SHORT_BINBYTES", "BINBYTES", "BINBYTES8")

# Instruction -> what it does, given the machine and the argument that stands behind it in the file.
_INSTRUCTIONS: dict[str, Callable] = {
    **{name: lambda m, _, value=value: _push(m, value) for name, value in _CONSTANTS.items()},
    **{name: lambda m, _, kind=kind: _push(m, kind()) for name, kind in _NEW.items()},
    **{name: lambda m, value: _push(m, value) for name in _GIVEN},
    **{f"TUPLE{n}": lambda m, _, n=n: _push(m, tuple(m.take(n))) for n in (1, 2, 3)},
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "STOP": lambda m, _: None,
    "MARK": lambda m, _: m.mark(),
    "TUPLE": lambda m, _: _push(m, tuple(m.top())),
    "POP": lambda m, _: m.take(1),
    "POP_MARK": lambda m, _: m.top(),
    "SETITEM": lambda m, _: m.add(dict, m.take(2)),
    "SETITEMS": lambda m, _: m.add(dict, m.top()),
    "APPEND": lambda m, _: m.add(list, m.take(1)),
    "APPENDS": lambda m, _: m.add(list, m.top()),
    "ADDITEMS": lambda m, _: m.add(set, m.top()),
    "MEMOIZE": lambda m, _: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    "BINPUT": lambda m, index: m.memo.__setitem__(index, m.stack[-1]),
    "LONG_BINPUT": lambda m, index: m.memo.__setitem__(index, m.stack[-1]),
    "BINGET": lambda m, index: _push(m, m.memo[index]),
    "LONG_BINGET": lambda m, index: _push(m, m.memo[index]),
    "GLOBAL": lambda m, name: m.look_up(name.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda m, _: m.look_up(".".join(map(str, m.take(2)))),
    "REDUCE": lambda m, _: m.call(),
    "NEWOBJ": lambda m, _: m.call(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: _push(m, m.outside(*m.take(1))),
}


def _no_outside(identifier):
    raise ValueError("it refers to something outside of the file")


def read_pickle(file: BinaryIO, names: Mapping, outside: Callable = _no_outside):
    """The object that a pickle describes; the file is left behind its last byte.

    Args:
        file: Open for reading. Its ``read(n)`` must not reserve n bytes before it knows that they exist: BytesIO and
            mmap do not, an open file does.
        names: For each admitted global, ``"module.name"``, a function that makes something plain of its arguments: a
            ``Record`` where the object has a state. For globals that are never called, anything.
        outside: From a persistent identifier (in which globals are ``Name``s) to what it stands for; default: refused.

    Raises:
        ValueError: A name or an instruction that is not admitted, or a broken file.
    """
    machine = _Machine(names, outside)
    try:
        for instruction, argument, _ in pickletools.genops(file):
            if instruction.name not in _INSTRUCTIONS:
                raise ValueError(f"it holds the instruction {instruction.name}, which plain values do not need")
            _INSTRUCTIONS[instruction.name](machine, argument)
        (result,) = machine.take(1)
        return result
    except (IndexError, KeyError, TypeError, UnicodeError, OverflowError, AttributeError) as error:
        raise ValueError(f"it is broken ({type(error).__name__}: {error})") from None
