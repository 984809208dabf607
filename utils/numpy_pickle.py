"""NumPy arrays out of pickles, read as data: nothing of NumPy is ever called with what the file says.

What pickles of arrays consist of, and what is made of it here:

    _reconstruct(ndarray, (0,), b"b"), BUILD (1, shape, dtype, fortran, bytes)      protocols 0 to 4
    _frombuffer(bytes, dtype, shape, order)                                         protocol 5
    scalar(dtype, bytes)                                                            a Python number
    dtype("f8", False, True), BUILD (3, "<", None, None, None, -1, -1, 0)           only kinds b, i, u, f, c

While the pickle is read these become plain records that hold whatever the file gave; afterwards ``NumpyUnpickler.load``
checks each record and replaces it by an array over its bytes. An array of objects, which is how ``np.save`` wraps a
dictionary, becomes a list. ``check_opcodes`` bounds what the unpickler itself does before it runs: the memo of Python's
unpickler grows to any index that a file names, and hashing a tuple nested 150,000 deep overflows the stack.
"""

import math
import pickle
import pickletools
import re
from collections.abc import Callable, Collection
from typing import BinaryIO

import numpy as np

MAX_OPCODES = 1_000_000                      # CIFAR-10's batches have 60,000
MAX_TUPLES = 20_000
_REFUSED = {"INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER",
            "FROZENSET", "EMPTY_SET", "ADDITEMS"}
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_ITEM_SIZES = {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8), "c": (8, 16)}


def check_opcodes(file: BinaryIO, allowed: Collection[str] = (), max_opcodes: int = MAX_OPCODES,
                  globals_: re.Pattern | None = None) -> None:
    """Walk through one pickle without executing it and leave ``file`` behind its end.

    Args:
        file: In memory, so that a length that the pickle claims cannot ask for more than there is.
        allowed: Opcodes that are admitted although arrays and plain values do not need them (``PERSID``, ...).
        max_opcodes: Most operations.
        globals_: What names "module name" of the opcode GLOBAL must match; None: whatever ``find_class`` says.

    Raises:
        pickle.UnpicklingError: Too many operations or tuples, memo entries without values, an opcode that builds
            objects, another name, or a pickle that is cut off or none at all.
    """
    tuples, refused = 0, _REFUSED.difference(allowed)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            tuples += opcode.name in _TUPLES
            if opcode.name in refused:
                raise pickle.UnpicklingError(f"it uses {opcode.name}, which plain values do not need")
            if opcode.name == "GLOBAL" and globals_ and not globals_.fullmatch(argument):
                raise pickle.UnpicklingError(f"it asks for {argument.replace(' ', '.')}")
            if opcode.name in _PUTS and argument > count:
                raise pickle.UnpicklingError(f"it numbers a value {argument}, though it has made {count} at most")
            if count >= max_opcodes or tuples > MAX_TUPLES:
                raise pickle.UnpicklingError(f"more than {max_opcodes:,} values or {MAX_TUPLES:,} tuples")
    except pickle.UnpicklingError:
        raise
    except Exception as error:               # pickletools raises ValueError, struct.error, UnicodeDecodeError, ...
        raise pickle.UnpicklingError(f"it is cut off, or no pickle: {error}") from None


class Plain:
    """A function that a pickle may call. Nothing in the file can change it: BUILD on it fails."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable):
        self._call = call

    def __call__(self, *args):
        return self._call(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("it changes a function")


class _Dtype:
    """What a pickle says about a dtype."""

    def __init__(self, *args):
        self.args, self.state = args, None

    def __setstate__(self, state):
        self.state = state

    def resolve(self) -> np.dtype:
        """A numeric dtype. Raises UnpicklingError for anything else."""
        code = _text(self.args[0]) if self.args else ""
        match = re.fullmatch(r"[<>=|]?([biufc])(\d{1,2})", code)
        if not match or int(match[2]) not in _ITEM_SIZES[match[1]]:
            raise pickle.UnpicklingError(f"it holds an array of type {code[:20]!r}; only plain numbers are read")
        if self.state is None:
            return np.dtype(code)
        order = _text(self.state[1]) if isinstance(self.state, tuple) and len(self.state) == 8 else ""
        if order not in tuple("<>|=") or self.state[:1] + self.state[2:] != (3, None, None, None, -1, -1, 0):
            raise pickle.UnpicklingError(f"it holds a type {code!r} with a state that plain numbers do not have")
        return np.dtype(order + match[1] + match[2])

    @property
    def holds_objects(self) -> bool:
        return len(self.args) > 0 and _text(self.args[0]) in ("O", "O8", "|O")


class _Array:
    """What a pickle says about an array."""

    def __init__(self, shape=(0,), dtype=None, fortran=False, content=b""):
        self.shape, self.dtype, self.fortran, self.content = shape, dtype, fortran, content

    def __setstate__(self, state):
        if not isinstance(state, tuple) or len(state) != 5 or state[0] != 1:
            raise pickle.UnpicklingError("it holds an array in a form that numpy does not write")
        _, self.shape, self.dtype, self.fortran, self.content = state

    def resolve(self):
        """(read-only) array, or the list of an array of objects. Raises UnpicklingError: not of that form."""
        if not isinstance(self.dtype, _Dtype) or not _is_shape(self.shape) or not isinstance(self.fortran, bool):
            raise pickle.UnpicklingError("it holds an array without a shape or type")
        count = math.prod(self.shape)
        if self.dtype.holds_objects:
            if not isinstance(self.content, list) or len(self.content) != count:
                raise pickle.UnpicklingError("it holds an array of objects without a list of them")
            return self.content
        array = _numbers(self.dtype.resolve(), self.content, count)
        return array.reshape(self.shape, order="F" if self.fortran else "C")


def _numbers(dtype: np.dtype, content, count: int) -> np.ndarray:
    """(count,) numbers over ``content``, whose length must be theirs exactly."""
    if not isinstance(content, (bytes, bytearray)) or len(content) != count * dtype.itemsize:
        given = len(content) if isinstance(content, (bytes, bytearray)) else "no"
        raise pickle.UnpicklingError(f"it holds an array of {count:,} x {dtype} with {given} bytes of content")
    if dtype.kind == "b":                    # bytes other than 0 and 1 would be neither True nor False
        return np.frombuffer(content, np.uint8) != 0
    return np.frombuffer(content, dtype)


def _reconstruct(kind, shape, code) -> _Array:
    if kind is not NDARRAY or shape != (0,) or _text(code) != "b":
        raise pickle.UnpicklingError("it builds an array in a way that numpy does not")
    return _Array()


def _from_buffer(content, dtype, shape, order) -> _Array:
    if order not in ("C", "F"):
        raise pickle.UnpicklingError("it holds an array whose order is neither C nor F")
    return _Array(shape, dtype, order == "F", content)


def _scalar(dtype, content):
    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError("it holds a number without a type")
    return _numbers(dtype.resolve(), content, 1)[0].item()


def _encode(text, encoding) -> bytes:
    """How byte strings travel in protocols 0 to 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("it encodes text as something other than latin1")
    return text.encode("latin1")


def _ordered(items=()) -> dict:
    return dict(items)


def _uncalled(*args):
    raise pickle.UnpicklingError("it calls numpy.ndarray")


def _text(value) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value if isinstance(value, str) else ""


def _is_shape(shape) -> bool:
    return isinstance(shape, tuple) and len(shape) <= 32 and all(type(n) is int and 0 <= n < 2**48 for n in shape)


NDARRAY = Plain(_uncalled)                   # only named, as the first argument of ``_reconstruct``
GLOBALS: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): NDARRAY,
    ("numpy", "dtype"): Plain(_Dtype),
    ("_codecs", "encode"): Plain(_encode),
    ("collections", "OrderedDict"): Plain(_ordered),
    ("__builtin__", "bytes"): Plain(lambda: b""), ("builtins", "bytes"): Plain(lambda: b""),     # empty ones, likewise
    **{(f"numpy.{core}.{module}", name): Plain(call) for core in ("core", "_core") for module, name, call in (
        ("multiarray", "_reconstruct", _reconstruct), ("multiarray", "scalar", _scalar),
        ("numeric", "_frombuffer", _from_buffer))},
}


class NumpyUnpickler(pickle.Unpickler):
    """Unpickles plain containers, numbers, text, bytes and numeric arrays. Run ``check_opcodes`` over the file first.

    Attributes:
        globals: ``{(module, name): object}``, everything that a file may ask for. Subclasses may add objects that are
            harmless to call with anything, and that BUILD cannot change (``Plain``).
    """

    globals = GLOBALS

    def find_class(self, module, name):
        if (module, name) in self.globals:
            return self.globals[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def load(self):
        """The object. Raises whatever a broken pickle raises; UnpicklingError for what is not admitted."""
        return _resolve(super().load(), {})


def _resolve(value, done: dict):
    """``value`` with every record replaced; lists and dictionaries are changed in place, so that circles stay circles.

    ``done`` maps the id of what was seen to (what was seen, what became of it): what is kept alive keeps its id.
    """
    if type(value) not in _WALKED:
        return value
    if id(value) in done:
        return done[id(value)][1]
    if isinstance(value, (list, dict)):
        done[id(value)] = value, value
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            value[key] = _resolve(item, done)
        return value
    if isinstance(value, tuple):
        result = tuple(_resolve(item, done) for item in value)
    elif isinstance(value, _Array):
        result = _resolve(value.resolve(), done)
    else:
        result = value.resolve()
    done[id(value)] = value, result
    return result


_WALKED = {list, dict, tuple, _Array, _Dtype}
