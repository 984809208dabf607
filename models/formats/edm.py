"""EDM's network snapshots (.pkl) and training states (.pt), read as data: nothing in them is ever executed.

Both hold whole Python objects: class name, constructor arguments, state, and the source text of the object's module,
which the programs that wrote them execute on loading. Here the text is skipped, and the network is rebuilt from the
class name, the arguments and the tensors. ``utils.pickle_data`` reads the pickle, ``models.formats.edm_objects`` says
what the names in it stand for.
"""

import io
import mmap
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from models.formats.common import State, StoredWeights
from models.formats.edm_objects import NAMES, STORAGES, PersistentObject, claim_of
from utils.errors import DataError
from utils.files import open_regular
from utils.pickle_data import read_pickle

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
        with open_regular(path) as file:
            if path.suffix == ".pkl":
                return file.read(1) == b"\x80"
            if not re.fullmatch(r"training-state-\d+\.pt", path.name) or not zipfile.is_zipfile(file):
                return False
            with zipfile.ZipFile(file) as archive, archive.open(f"{_folder(archive)}/data.pkl") as pickle:
                return b"torch_utils.persistence" in pickle.read(4096)
    except (OSError, KeyError, zipfile.BadZipFile, DataError):         # DataError: a folder, a pipe
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
    if not isinstance(content, dict) or not isinstance(content.get("ema"), PersistentObject):
        raise ValueError("it holds no network under 'ema'")
    dataset = content.get("dataset_kwargs")
    return _record(path, content["ema"], loss=_part(content.get("loss_fn")),
                   augment=_part(content.get("augment_pipe")), dataset=dataset if isinstance(dataset, dict) else None)


def _training_state(path: Path, file: BinaryIO) -> Snapshot:
    with zipfile.ZipFile(file) as archive:
        folder = _folder(archive)
        loaded: dict[str, Tensor] = {}

        def outside(identifier):
            claim = claim_of(identifier)
            if claim.key not in loaded:
                loaded[claim.key] = claim.fill(_stored(archive, f"{folder}/data/{claim.key}"))
            return loaded[claim.key]

        content = read_pickle(io.BytesIO(_stored(archive, f"{folder}/data.pkl")), NAMES | STORAGES, outside)
    if not isinstance(content, dict) or not isinstance(content.get("net"), PersistentObject):
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


def _record(path: Path, network: PersistentObject, **others) -> Snapshot:
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
    if not isinstance(content, PersistentObject):
        return None
    return Part(content.class_name, {name: value for name, value in content.attributes.items()
                                     if isinstance(value, str | int | float | bool) and not name.startswith("_")})


def _tensors(network: PersistentObject) -> Iterator[tuple[str, Tensor]]:
    """What ``network.state_dict()`` would hold, in its order."""
    ahead, seen = [("", network)], 0
    while ahead:
        prefix, module = ahead.pop()
        seen += 1
        if seen > MAX_MODULES:                                 # modules inside themselves, or shared without end
            raise ValueError(f"it has more than {MAX_MODULES} modules")
        if not isinstance(module, PersistentObject):
            raise ValueError(f"what it calls the module {prefix.rstrip('.')} is none")
        hidden = module.attributes.get("_non_persistent_buffers_set", ())
        for kind in ("_parameters", "_buffers"):
            for name, value in module.attributes.get(kind, {}).items():
                if isinstance(value, Tensor) and name not in hidden:
                    yield f"{prefix}{name}", value
        children = module.attributes.get("_modules", {}).items()
        ahead += [(f"{prefix}{name}.", child) for name, child in reversed(children) if child is not None]
