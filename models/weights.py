"""Weights from every program of this family, read without executing anything that their files contain.

A format is a name in ``FORMATS`` with a recogniser and a reader. Whatever the file, the result is one state dict under
DDIM's names, without the ``module.`` and ``_orig_mod.`` that wrappers put in front.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.ema import combination, combine
from models.formats import FORMATS, bare_name, is_snapshot
from models.formats.adm import read_settings
from models.formats.common import State, is_state, read_safetensors, safetensors_metadata
from models.formats.edm import read_snapshot
from models.formats.edm_settings import about, settings_of
from models.formats.plain import settings_beside
from models.pretrained import LORA_FILE, is_pretrained, lora_from_file, read_unet_folder
from models.trained import trained
from utils.errors import DataError, UserError
from utils.safe_load import load_torch


@dataclass(frozen=True)
class WeightsInfo:
    """What was loaded.

    Attributes:
        format: Name in ``FORMATS``.
        kind: "ema", "raw", or "unknown" where the file does not say.
        step: Optimizer steps behind the weights, None where the file does not say.
        epoch: Completed epochs, likewise.
        fingerprint: ``weights_fingerprint`` of the loaded tensors.
    """

    format: str
    kind: str
    step: int | None
    epoch: int | None
    fingerprint: str


def load_weights(model: nn.Module, path: str | Path, *, ema: bool = True) -> WeightsInfo:
    """Read a checkpoint file or a diffusers folder into ``model``, all of it or nothing.

    Args:
        model: From ``build_model``; a wrapped or compiled one is fine.
        path: Any of ``FORMATS``.
        ema: Which set to take where the file holds both; a file with one set gives that one.

    Raises:
        UserError: No such file or folder, or averaged weights asked of a DDIM file that was saved without them.
        DataError: Truncated, no checkpoint, not loadable without running code, or weights of another network.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no such weights: {path}")
    no_pickle = path.is_dir() or path.suffix == ".safetensors"
    if is_pretrained(model) and no_pickle:
        return _load_pretrained(model, path)
    content = None if no_pickle or is_snapshot(path) else load_torch(path)
    _check_digest(content, path)
    for name, (recognises, read) in FORMATS.items():
        if recognises(path, content):
            weights = read(path, content, ema)
            _copy_into(model, weights.state, f"{path} ({name})")
            return WeightsInfo(name, weights.kind, weights.step, weights.epoch, weights_fingerprint(weights.state))
    raise DataError(f"{path}: holds no weights in a known form; known: {', '.join(FORMATS)}")


def _load_pretrained(model: nn.Module, path: Path) -> WeightsInfo:
    """Files of diffusers for a U-Net of diffusers: a folder with the whole network, or adapters."""
    lora = path / LORA_FILE if path.is_dir() else path
    if not lora.is_file():
        name, state = "diffusers-unet", read_unet_folder(path)
    elif model.lora_scale is None:
        raise UserError(f"{lora}: adapters; the configuration of this network has none, set model.lora_rank")
    else:
        name, state = "lora", lora_from_file(read_safetensors(lora), safetensors_metadata(lora), model.lora_scale, lora)
    _copy_into(model, state, f"{path} ({name})")
    return WeightsInfo(name, "unknown", None, None, weights_fingerprint(state))


def stored_settings(path: str | Path) -> dict[str, dict] | None:
    """Sections of a configuration that a file of weights brings itself, or the JSON beside it; None: neither does.

    Raises:
        DataError: A broken file, or a network that cannot be rebuilt here.
    """
    path = Path(path)
    return settings_of(read_snapshot(path)) if is_snapshot(path) else settings_beside(path)


def about_weights(path: str | Path) -> dict[str, str]:
    """What a file says of how its weights were made, for people; empty where it says nothing."""
    path = Path(path)
    return about(read_snapshot(path)) if is_snapshot(path) else {}


def load_profile(model: nn.Module, files: Sequence[Path], length: float) -> WeightsInfo:
    """Make up the average of relative width ``length`` from stored power-function averages (EDM2, 2312.02696).

    Args:
        files: phema_{epoch}_{length}.pth, the newest last; the average ends where it does.
        length: In (0, 0.289).

    Raises:
        UserError: A length out of range. DataError: A broken file, or weights of another network.
    """
    if not 0 < length < 0.289:
        raise UserError(f"--ema_length {length:g} is not in (0, 0.289)")
    stored = [load_torch(path) for path in files]
    for path, content in zip(files, stored, strict=True):
        if not _is_profile(content):
            raise DataError(f"{path}: no power-function average of this program")
        check_fits(model, content["weights"], str(path))
    step = stored[-1]["step"]
    kept = [(each["step"], each["length"]) for each in stored]
    if len(set(kept)) < len(kept):
        raise DataError(f"{files[-1]}: no power-function average of its own: another file has the same step and length")
    coefficients = combination(kept, (step, length))
    state = combine([each["weights"] for each in stored], coefficients)
    _copy_into(model, state, f"{files[-1].parent} (averages)")
    return WeightsInfo("sa-ddim-averages", f"ema of length {length:g}", step, None, weights_fingerprint(state))


def _is_profile(content) -> bool:
    return (isinstance(content, dict) and {"step", "length", "weights"} <= content.keys()
            and type(content["step"]) is int and content["step"] > 0
            and isinstance(content["length"], float) and 0 < content["length"] < 0.289 and is_state(content["weights"]))


def weights_fingerprint(state: State) -> str:
    """16 hex digits of SHA-256 over sorted names, shapes, dtypes and bytes: equal for equal tensors from any file."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def with_digest(state: State, digest: str) -> State:
    """The same weights as a state dict whose metadata, where modules keep their versions, hold a digest of them."""
    marked = OrderedDict(state)
    marked._metadata = OrderedDict({"": {"version": 1, "digest": digest}})
    return marked


def _check_digest(content, path: Path) -> None:
    """Compare weights with the digest in their metadata or, of a full state, under "digests"; most files have none."""
    metadata = getattr(content, "_metadata", None)
    root = metadata.get("") if isinstance(metadata, dict) else None
    digests = {None: root.get("digest")} if isinstance(root, dict) else {}
    if isinstance(content, dict) and isinstance(content.get("digests"), dict):
        digests |= {key: content["digests"].get(key) for key in ("model", "ema")}
    for key, digest in digests.items():
        weights = content if key is None else content.get(key)
        dense = is_state(weights) and all(tensor.layout == torch.strided for tensor in weights.values())
        if digest is not None and not (dense and digest == weights_fingerprint(weights)):
            raise DataError(f"{path}: its weights have another digest than it says: the file was changed or damaged; "
                            "copy it again")


def _copy_into(model: nn.Module, state: State, where: str) -> None:
    own = check_fits(model, state, where)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def check_fits(model: nn.Module, state: State, where: str) -> State:
    """The tensors of ``model`` that ``state`` would replace. DataError: they are of another network."""
    own = {bare_name(name): tensor for name, tensor in trained(model).items()}
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [f"{name} {_shape(state[name])} instead of {_shape(own[name])}"
                             for name in own if name in state and state[name].shape != own[name].shape],
        "not dense floats": [name for name, tensor in state.items()
                             if tensor.layout != torch.strided or not tensor.is_floating_point()],
    }
    found = [f"{len(names)} {what}: {_shorten(names)}" for what, names in problems.items() if names]
    if found:
        found = _contradictions(own, state) or found
        raise DataError(f"{where}: weights of another network: {'; '.join(found)}")
    return own


def _contradictions(own: State, state: State) -> list[str]:
    """The settings in which the two differ, as far as the tensors of both tell them: of ADM's networks alone."""
    try:
        theirs, ours = read_settings(state), read_settings(own)
    except DataError:                                          # one is a network of another family
        return []
    return [f"{key} is {value} in the file, {ours[key]} in the configuration"
            for key, value in theirs.items() if key in ours and ours[key] != value]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
