"""EDM's network snapshots (.pkl) and training states (.pt), read as data: nothing in them is ever executed.

Both hold whole Python objects: class name, constructor arguments, state, and the source text of the object's module,
which the programs that wrote them execute on loading. Here the text is skipped, and the network is rebuilt from the
class name, the arguments and the tensors. ``utils.pickle_data`` reads the pickle; this module says what each of the
dozen names that such a file may ask for stands for.
"""

import io
import mmap
import re
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from models.formats.common import State, StoredWeights
from utils.errors import DataError
from utils.files import open_regular
from utils.pickle_data import Name, Record, plain_dict, plain_set, read_pickle

MAX_MODULES = 10_000                            # the largest published network has 500
ZIP_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True)
class Part:
    """A persistent object that is no network: loss function, augmentation."""

    class_name: str
    numbers: dict                               # its plain attributes


@dataclass(frozen=True)
class Snapshot:
    """What a snapshot or a training state holds.

    Attributes:
        class_name: The preconditioner, such as EDMPrecond.
        init_kwargs: Its constructor arguments as called, those of the network included.
        state: Tensors of the network, in the order and by the names of its own state dict.
        buffers: Tensors of the preconditioner itself.
        loss, augment, dataset: None where the file does not say.
        optimizer: Adam's state dict from a training state, indices in the order of the parameters; else None.
    """

    path: Path
    class_name: str
    init_kwargs: dict
    state: State = field(repr=False)
    buffers: State = field(repr=False)
    loss: Part | None = None
    augment: Part | None = None
    dataset: dict | None = None
    optimizer: dict | None = field(default=None, repr=False)


def is_snapshot(path: Path) -> bool:
    """Whether a file looks like one of EDM's: a bare pickle, or a torch file that asks for EDM's objects."""
    try:
        with open(path, "rb") as file:
            if path.suffix == ".pkl":
                return file.read(1) == b"\x80"
            if not re.fullmatch(r"training-state-\d+\.pt", path.name) or not zipfile.is_zipfile(file):
                return False
            with zipfile.ZipFile(file) as archive, archive.open(f"{_folder(archive)}/data.pkl") as pickle:
                return b"torch_utils.persistence" in pickle.read(4096)
    except (OSError, KeyError, zipfile.BadZipFile):
        return False


def read_edm(path: Path, content: None, ema: bool) -> StoredWeights:
    """The one set of weights of a file: averages in a snapshot, raw ones in a training state."""
    snapshot = read_snapshot(path)
    return StoredWeights(snapshot.state, "ema" if snapshot.optimizer is None else "raw")


def read_snapshot(path: str | Path) -> Snapshot:
    """Read a network snapshot, or a training state.

    Raises:
        DataError: No such file, broken, or it asks for anything beyond plain values, tensors and EDM's objects.
    """
    path = Path(path)
    with open_regular(path) as file:
        try:
            is_zip = file.read(4) == ZIP_MAGIC
            file.seek(0)
            return _training_state(path, file) if is_zip else _snapshot(path, file)
        except Exception as error:            # a broken file raises anything: KeyError, TypeError, MemoryError, ...
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{path}: not loaded as a network of EDM, nothing in it was run: {reason}") from None


def _snapshot(path: Path, file: BinaryIO) -> Snapshot:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:      # reads no more than there is
        content = read_pickle(data, NAMES)
    if not isinstance(content, dict) or not isinstance(content.get("ema"), _Object):
        raise ValueError("it holds no network under 'ema'")
    dataset = content.get("dataset_kwargs")
    return _record(path, content["ema"], loss=_part(content.get("loss_fn")),
                   augment=_part(content.get("augment_pipe")), dataset=dataset if isinstance(dataset, dict) else None)


def _training_state(path: Path, file: BinaryIO) -> Snapshot:
    with zipfile.ZipFile(file) as archive:
        folder = _folder(archive)
        loaded: dict[str, Tensor] = {}

        def outside(identifier):
            claim = _claim(identifier)
            if claim.key not in loaded:
                loaded[claim.key] = claim.fill(_stored(archive, f"{folder}/data/{claim.key}"))
            return loaded[claim.key]

        content = read_pickle(io.BytesIO(_stored(archive, f"{folder}/data.pkl")), NAMES | STORAGES, outside)
    if not isinstance(content, dict) or not isinstance(content.get("net"), _Object):
        raise ValueError("it holds no network under 'net'")
    return _record(path, content["net"], optimizer=content.get("optimizer_state"))


def _folder(archive: zipfile.ZipFile) -> str:
    names = archive.namelist()
    return names[0].split("/")[0] if names else ""


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise ValueError(f"it has no entry {name}") from None
    if info.compress_type != zipfile.ZIP_STORED:               # so that no entry is larger than the file
        raise ValueError(f"its entry {name} is compressed, which torch.save never does")
    return archive.read(info)


def _record(path: Path, network: "_Object", **others) -> Snapshot:
    tensors = dict(_tensors(network))
    own = {name for name in tensors if not name.startswith("model.")}
    arguments = network.attributes.get("_init_kwargs")
    if not isinstance(arguments, dict) or network.attributes.get("_init_args"):
        raise ValueError(f"the arguments of its {network.class_name} are not known by name")
    return Snapshot(path, network.class_name, {name: _plain(value, name) for name, value in arguments.items()},
                    state={name.removeprefix("model."): tensor for name, tensor in tensors.items() if name not in own},
                    buffers={name: tensors[name] for name in tensors if name in own}, **others)


def _plain(value, name: str):
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError(f"its argument {name} is a {type(value).__name__}")
    return value


def _part(content) -> Part | None:
    if not isinstance(content, _Object):
        return None
    return Part(content.class_name, {name: value for name, value in content.attributes.items()
                                     if isinstance(value, str | int | float | bool) and not name.startswith("_")})


def _tensors(network: "_Object") -> Iterator[tuple[str, Tensor]]:
    """What ``network.state_dict()`` would hold, in its order."""
    ahead, seen = [("", network)], 0
    while ahead:
        prefix, module = ahead.pop()
        seen += 1
        if seen > MAX_MODULES:                                 # modules inside themselves, or shared without end
            raise ValueError(f"it has more than {MAX_MODULES} modules")
        if not isinstance(module, _Object):
            raise ValueError(f"what it calls the module {prefix.rstrip('.')} is none")
        hidden = module.attributes.get("_non_persistent_buffers_set", ())
        for kind in ("_parameters", "_buffers"):
            for name, value in module.attributes.get(kind, {}).items():
                if isinstance(value, Tensor) and name not in hidden:
                    yield f"{prefix}{name}", value
        children = module.attributes.get("_modules", {}).items()
        ahead += [(f"{prefix}{name}.", child) for name, child in reversed(children) if child is not None]


# ------------------------------------------------------------------------------------------- what the names stand for


class _Object(Record):
    """A persistent object, or a module of PyTorch's."""

    def __init__(self, class_name: str, state: dict | None = None):
        self.class_name, self.state = class_name, state

    @property
    def attributes(self) -> dict:
        if not isinstance(self.state, dict):
            raise ValueError(f"its {self.class_name} has no state")
        return self.state


def _persistent(meta: dict) -> _Object:
    """{"type": "class", "version", "module_src", "class_name", "state"}; the source text is not looked at."""
    if not isinstance(meta, dict) or meta.get("type") != "class":
        raise ValueError("it holds a persistent object that is none")
    return _Object(str(meta.get("class_name")), meta.get("state"))


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


def _claim(identifier) -> _Claim:
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
    claim = read_pickle(file, STORAGES, outside=_claim)
    keys = read_pickle(file, {})
    if not isinstance(claim, _Claim) or keys != [claim.key] or file.read(8) != struct.pack("<q", claim.count):
        raise ValueError("it holds a storage that contradicts itself")
    return claim.fill(file.read())


NUMPY = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")           # before and since NumPy 2
NAMES = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch.nn.modules.container.ModuleDict": lambda: _Object("ModuleDict"),
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
