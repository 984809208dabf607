"""What each of the dozen names that EDM's pickles may ask for stands for; any other name is refused."""

import io
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.pickle_data import Name, Record, plain_dict, plain_set, read_pickle


class PersistentObject(Record):
    """A persistent object, or a module of PyTorch's."""

    def __init__(self, class_name: str, state: dict | None = None):
        self.class_name, self.state = class_name, state

    @property
    def attributes(self) -> dict:
        if not isinstance(self.state, dict):
            raise ValueError(f"its {self.class_name} has no state")
        return self.state


def _persistent(meta: dict) -> PersistentObject:
    """{"type": "class", "version", "module_src", "class_name", "state"}; the source text is not looked at."""
    if not isinstance(meta, dict) or meta.get("type") != "class":
        raise ValueError("it holds a persistent object that is none")
    return PersistentObject(str(meta.get("class_name")), meta.get("state"))


class _NumpyType(Record):
    """numpy.dtype of a plain number, such as "f8"; its state says the byte order."""

    def __init__(self, code: str, *_):
        self.code = code

    def number(self, data: bytes):
        if self.code not in STRUCT_CODES or not isinstance(data, bytes):
            raise ValueError(f"it holds a NumPy value of type {self.code!r}")
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "|"
        return struct.unpack(("<" if order == "|" else str(order)) + STRUCT_CODES[self.code], data)[0]


STRUCT_CODES = {"f2": "e", "f4": "f", "f8": "d", "i4": "i", "i8": "q", "b1": "?"}


def _scalar(kind: _NumpyType, data: bytes):
    return kind.number(data)


def _tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_) -> Tensor:
    """torch._utils._rebuild_tensor_v2: a view, never more elements than the storage has."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Tensor) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("it holds a tensor with an impossible shape")
    count = 1
    for side in size:
        count *= side
    if count > len(storage):
        raise ValueError(f"it holds a tensor of {count} numbers in a storage of {len(storage)}")
    return storage.as_strided(size, stride, offset)


@dataclass(frozen=True)
class _Claim:
    """What a persistent identifier says of a storage."""

    dtype: torch.dtype
    key: str
    count: int

    def fill(self, data: bytes) -> Tensor:
        """(count,), from bytes that must be as many as were claimed."""
        claimed = self.count * self.dtype.itemsize
        if claimed != len(data):
            raise ValueError(f"it claims a storage of {claimed} bytes, and has {len(data)}")
        return torch.frombuffer(bytearray(data), dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)


def claim_of(identifier) -> _Claim:
    """("storage", storage type, key, location, count, ...)"""
    if not isinstance(identifier, tuple) or len(identifier) < 5 or identifier[0] != "storage":
        raise ValueError("it refers to something that is no storage")
    _, kind, key, _, count = identifier[:5]
    if not isinstance(kind, Name) or not isinstance(kind.meaning, torch.dtype) or type(count) is not int:
        raise ValueError("it refers to a storage of no known type")
    return _Claim(kind.meaning, str(key), count)


def _storage(data: bytes) -> Tensor:
    """torch.storage._load_from_bytes: a file in a file, of torch.save's form before 1.6, with one storage.

    Five pickles (magic number, version, system, storage, its key), then the count as int64 and the elements.
    """
    if not isinstance(data, bytes):
        raise ValueError("it holds a storage that is no bytes")
    file = io.BytesIO(data)
    magic, _, system = (read_pickle(file, {}) for _ in range(3))
    if magic != 0x1950A86A20F9469CFC6C or not isinstance(system, dict) or not system.get("little_endian"):
        raise ValueError("it holds a storage in no known form")
    claim = read_pickle(file, STORAGES, outside=claim_of)
    keys = read_pickle(file, {})
    if not isinstance(claim, _Claim) or keys != [claim.key] or file.read(8) != struct.pack("<q", claim.count):
        raise ValueError("it holds a storage that contradicts itself")
    return claim.fill(file.read())


NUMPY = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")           # before and since NumPy 2
NAMES = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch.nn.modules.container.ModuleDict": lambda: PersistentObject("ModuleDict"),
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "collections.OrderedDict": plain_dict,
    "dnnlib.util.EasyDict": plain_dict,
    "__builtin__.set": plain_set,                     # this and the next: as torch.save's older protocol writes them
    "_codecs.encode": lambda text, _: text.encode("latin1"),
    "numpy.dtype": _NumpyType,
    **dict.fromkeys(NUMPY, _scalar),
}
STORAGES = {f"torch.{name}Storage": dtype for name, dtype in (
    ("Double", torch.float64), ("Float", torch.float32), ("Half", torch.float16), ("BFloat16", torch.bfloat16),
    ("Long", torch.int64), ("Int", torch.int32), ("Bool", torch.bool))}
