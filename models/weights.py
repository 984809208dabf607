"""Weights from every program of this family, read without executing anything that their files contain.

A format is a name in ``FORMATS`` with a recogniser and a reader. Whatever the file, the result is one state dict under
DDIM's names, without the ``module.`` and ``_orig_mod.`` that wrappers put in front.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.errors import DataError, UserError
from utils.safe_load import load_torch

State = dict[str, Tensor]


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


@dataclass(frozen=True)
class _Weights:
    state: State
    kind: str = "unknown"
    step: int | None = None
    epoch: int | None = None


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
    content = None if path.is_dir() else load_torch(path)
    for name, (recognises, read) in FORMATS.items():
        if recognises(path, content):
            weights = read(path, content, ema)
            _copy_into(model, weights.state, f"{path} ({name})")
            return WeightsInfo(name, weights.kind, weights.step, weights.epoch, weights_fingerprint(weights.state))
    raise DataError(f"{path}: holds no weights in a known form; known: {', '.join(FORMATS)}")


def weights_fingerprint(state: State) -> str:
    """16 hex digits of SHA-256 over sorted names, shapes, dtypes and bytes: equal for equal tensors from any file."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def bare_name(name: str) -> str:
    """A parameter's name without what DistributedDataParallel and torch.compile put in front."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", name)


def _copy_into(model: nn.Module, state: State, where: str) -> None:
    own = {bare_name(name): tensor for name, tensor in model.state_dict().items()}
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
        raise DataError(f"{where}: weights of another network: {'; '.join(found)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _shorten(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


# Readers. Each takes (path, content, ema), content being what load_torch gave (None for a folder).

def _is_state(content) -> bool:
    return isinstance(content, dict) and bool(content) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())


def _bare(state, path: Path, what: str) -> State:
    if not _is_state(state):
        raise DataError(f"{path}: its {what} is no state dict of tensors")
    return {bare_name(name): tensor for name, tensor in state.items()}


def _count(value) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _read_ours(path: Path, content: dict, ema: bool) -> _Weights:
    """``{"format_version", "config", "step", "epoch", "model", "ema": state dict or None, ...}``"""
    kind, key = ("ema", "ema") if ema and content.get("ema") else ("raw", "model")
    return _Weights(_bare(content[key], path, f'entry "{key}"'), kind,
                    _count(content.get("step")), _count(content.get("epoch")))


def _read_sa_dpm(path: Path, content: dict, ema: bool) -> _Weights:
    """``{"model_dict", "epoch", ..., OPTIMIZER: {"state": {parameter index: {"ema", ...}}, "param_groups"}}``

    The indices count the parameters in ``named_parameters()`` order, which is that of the state dict: no buffers.
    """
    state = _bare(content["model_dict"], path, 'entry "model_dict"')
    step, epoch = _count(content.get("global_step", content.get("step"))), _count(content.get("epoch"))
    averages = _sa_dpm_averages(content)
    if not ema or not averages:
        return _Weights(state, "raw", step, epoch)
    if averages.keys() != set(range(len(state))) or any(
            averages[i].shape != tensor.shape for i, tensor in enumerate(state.values())):
        raise DataError(f"{path}: its {len(averages)} averaged tensors do not match its {len(state)} parameters")
    return _Weights({name: averages[i] for i, name in enumerate(state)}, "ema", step, epoch)


def _sa_dpm_averages(content: dict) -> dict[int, Tensor]:
    """``{parameter index: average}`` from the optimizer's state, under whatever key of the file that lies."""
    states = [value["state"] for value in content.values() if isinstance(value, dict) and "state" in value]
    return {index: slots["ema"] for state in states if isinstance(state, dict) for index, slots in state.items()
            if isinstance(slots, dict) and isinstance(slots.get("ema"), Tensor)}


def _read_ddim(path: Path, content: list, ema: bool) -> _Weights:
    """``[model, optimizer, epoch, step]`` and, when DDIM trained with EMA, ``ema``."""
    if ema and len(content) == 4:
        raise UserError(f"{path}: a DDIM checkpoint saved without EMA weights; ask for the raw ones (--no-model_ema)")
    kind, index = ("ema", 4) if ema else ("raw", 0)
    return _Weights(_bare(content[index], path, f"entry {index}"), kind, _count(content[3]), _count(content[2]))


def _read_ema_file(path: Path, content: dict, ema: bool) -> _Weights:
    epoch = int(_EMA_FILE.fullmatch(path.name)[1])
    return _Weights(_bare(content, path, "content"), "ema", epoch=epoch)


def _read_bare(path: Path, content: dict, ema: bool) -> _Weights:
    return _Weights(_bare(content, path, "content"))


# diffusers: names, and the settings that its weights do not show.

_DIFFUSERS_NAMES = [(re.compile(pattern), name) for pattern, name in (
    (r"^time_embedding\.linear_1\.", "temb.dense.0."),
    (r"^time_embedding\.linear_2\.", "temb.dense.1."),
    (r"^conv_norm_out\.", "norm_out."),
    (r"^mid_block\.resnets\.0\.", "mid.block_1."),
    (r"^mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"^mid_block\.resnets\.1\.", "mid.block_2."),
    (r"^(down|up)_blocks\.", r"\1."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.time_emb_proj\.", ".temb_proj."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.(to_q|query)\.", ".q."),
    (r"\.(to_k|key)\.", ".k."),
    (r"\.(to_v|value)\.", ".v."),
    (r"\.(to_out\.0|proj_attn)\.", ".proj_out."),
)]

# key: (what DDIM's network computes, what diffusers takes when the key is absent)
_DIFFUSERS_SETTINGS = {
    "_class_name": ("UNet2DModel", "UNet2DModel"),
    "act_fn": ("silu", "silu"),
    "attention_head_dim": (None, 8),
    "center_input_sample": (False, False),
    "class_embed_type": (None, None),
    "downsample_padding": (0, 1),
    "flip_sin_to_cos": (False, True),
    "freq_shift": (1, 0),
    "mid_block_scale_factor": (1, 1),
    "norm_eps": (1e-6, 1e-5),
    "norm_num_groups": (32, 32),
    "resnet_time_scale_shift": ("default", "default"),
    "time_embedding_type": ("positional", "positional"),
}


def _read_diffusers(path: Path, content: None, ema: bool) -> _Weights:
    """A folder of ``UNet2DModel.save_pretrained``, or of a pipeline that has it in ``unet/``."""
    folder = _diffusers_folder(path)
    try:
        settings = json.loads((folder / "config.json").read_text())
        given = {key: settings.get(key, default) for key, (_, default) in _DIFFUSERS_SETTINGS.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{folder / 'config.json'}: cannot be read: {error}") from None
    state = _rename_diffusers(_bare(_diffusers_tensors(folder), folder, "weights file"))
    if {len(tensor) for name, tensor in state.items() if name.endswith(".q.bias")} == {given["attention_head_dim"]}:
        given["attention_head_dim"] = None                     # as wide as the attention: also a single head
    differing = [f"{key} is {given[key]!r}, needed {needed!r}"
                 for key, (needed, _) in _DIFFUSERS_SETTINGS.items() if given[key] != needed]
    if differing:
        raise DataError(f"{folder / 'config.json'}: another network than DDIM's: {'; '.join(differing)}")
    return _Weights(state)


def _diffusers_folder(path: Path) -> Path:
    return path / "unet" if (path / "unet" / "config.json").is_file() else path


def _diffusers_tensors(folder: Path) -> State:
    """Pickles go through ``load_torch``; safetensors files cannot hold code."""
    file = folder / "diffusion_pytorch_model.safetensors"
    if not file.is_file():
        return load_torch(file.with_suffix(".bin"))
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{file}: not loaded, broken or no safetensors file: {error}") from None


def _rename_diffusers(state: State) -> State:
    """DDIM's names and shapes. diffusers numbers the up side from the lowest resolution, DDIM from the highest."""
    top = max((int(found[1]) for name in state if (found := re.match(r"up_blocks\.(\d+)\.", name))), default=0)
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^up_blocks\.(\d+)", lambda found: f"up_blocks.{top - int(found[1])}", name)
        for pattern, replacement in _DIFFUSERS_NAMES:
            name = pattern.sub(replacement, name)
        is_linear = re.search(r"\.(q|k|v|proj_out)\.weight$", name) and tensor.ndim == 2
        renamed[name] = tensor[:, :, None, None] if is_linear else tensor                    # (C, C) -> (C, C, 1, 1)
    return renamed


_EMA_FILE = re.compile(r"model_(\d+)_ema\.pth")

# The first recogniser that says yes decides. Keys and lengths tell the formats apart, for bare state dicts the name.
FORMATS: dict[str, tuple[Callable, Callable]] = {
    "diffusers": (
        lambda path, content: content is None and (_diffusers_folder(path) / "config.json").is_file(), _read_diffusers),
    "sa-ddim": (
        lambda path, content: isinstance(content, dict) and {"format_version", "model"} <= content.keys(), _read_ours),
    "sa-dpm": (
        lambda path, content: isinstance(content, dict) and "model_dict" in content, _read_sa_dpm),
    "ddim": (
        lambda path, content: isinstance(content, (list, tuple)) and len(content) in (4, 5), _read_ddim),
    "sa-dpm-ema": (
        lambda path, content: _is_state(content) and _EMA_FILE.fullmatch(path.name)
        and all(name.startswith("module.") for name in content), _read_ema_file),
    "sa-ddim-ema": (
        lambda path, content: _is_state(content) and _EMA_FILE.fullmatch(path.name), _read_ema_file),
    "state-dict": (
        lambda path, content: _is_state(content), _read_bare),
}
