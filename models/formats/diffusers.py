"""diffusers' ``UNet2DModel`` folders, as far as they hold DDIM's network, and the same numbers under either's names."""

import re
from pathlib import Path

from models.formats.common import State, StoredWeights, bare, read_safetensors
from utils.errors import DataError
from utils.files import read_settings
from utils.safe_load import load_torch

# A piece of a name, between dots, in DDIM's network and in diffusers': in either direction one after the other.
NAMES = (
    ("temb.dense.0", "time_embedding.linear_1"), ("temb.dense.1", "time_embedding.linear_2"),
    ("norm_out", "conv_norm_out"),
    ("mid.block_1", "mid_block.resnets.0"), ("mid.attn_1", "mid_block.attentions.0"),
    ("mid.block_2", "mid_block.resnets.1"),
    ("down", "down_blocks"), ("up", "up_blocks"), ("block", "resnets"), ("attn", "attentions"),
    ("downsample", "downsamplers.0"), ("upsample", "upsamplers.0"),
    ("temb_proj", "time_emb_proj"), ("nin_shortcut", "conv_shortcut"), ("norm", "group_norm"),
    ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"),
)
OLDER_NAMES = (("q", "query"), ("k", "key"), ("v", "value"), ("proj_out", "proj_attn"))      # of diffusers'

# key: (what DDIM's network computes, what diffusers takes when the key is absent)
_DIFFUSERS_SETTINGS = {
    "_class_name": ("UNet2DModel", "UNet2DModel"),
    "act_fn": ("silu", "silu"),
    "add_attention": (True, True),
    "attention_head_dim": (None, 8),
    "attn_norm_num_groups": (None, None),
    "center_input_sample": (False, False),
    "class_embed_type": (None, None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "conv"),
    "flip_sin_to_cos": (False, True),
    "freq_shift": (1, 0),
    "mid_block_scale_factor": (1, 1),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "norm_eps": (1e-6, 1e-5),
    "norm_num_groups": (32, 32),
    "num_class_embeds": (None, None),
    "resnet_time_scale_shift": ("default", "default"),
    "time_embedding_type": ("positional", "positional"),
    "upsample_type": ("conv", "conv"),
}
# What names and shapes of the weights show, or what only training reads.
_SEEN_IN_WEIGHTS = {"sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block",
                    "down_block_types", "up_block_types", "time_embedding_dim", "num_train_timesteps", "dropout"}


def read_diffusers(path: Path, content: None, ema: bool) -> StoredWeights:
    """A folder of ``UNet2DModel.save_pretrained``, or of a pipeline that has it in ``unet/``."""
    folder = diffusers_folder(path)
    settings = read_settings(folder / "config.json")
    given = {key: settings.get(key, default) for key, (_, default) in _DIFFUSERS_SETTINGS.items()}
    state = to_ddim_names(bare(_diffusers_tensors(folder), folder, "weights file"))
    widths = {tensor.shape[:1] for name, tensor in state.items() if name.endswith(".q.bias")}
    head_dim = given["attention_head_dim"]
    if isinstance(head_dim, int) and widths == {(head_dim,)}:
        given["attention_head_dim"] = None                     # as wide as the attention: also a single head
    if given["attn_norm_num_groups"] == given["norm_num_groups"]:
        given["attn_norm_num_groups"] = None                   # which means the same
    differing = [f"{key} is {given[key]!r}, needed {needed!r}"
                 for key, (needed, _) in _DIFFUSERS_SETTINGS.items() if given[key] != needed]
    differing += [f"{key} is {value!r}, which is not known here" for key, value in sorted(settings.items())
                  if value is not None and not key.startswith("_")
                  and key not in _DIFFUSERS_SETTINGS.keys() | _SEEN_IN_WEIGHTS]
    if differing:
        raise DataError(f"{folder / 'config.json'}: another network than DDIM's: {'; '.join(differing)[:400]}")
    return StoredWeights(state)


def diffusers_folder(path: Path) -> Path:
    return path / "unet" if (path / "unet" / "config.json").is_file() else path


def _diffusers_tensors(folder: Path) -> State:
    """Pickles go through ``load_torch``; safetensors files cannot hold code."""
    file = folder / "diffusion_pytorch_model.safetensors"
    return read_safetensors(file) if file.is_file() else load_torch(file.with_suffix(".bin"))


# --------------------------------------------------------------------------------------------------- names and shapes
# diffusers numbers the up side from the lowest resolution, DDIM from the highest; its attention has linear layers where
# DDIM has 1x1 convolutions.


def to_ddim_names(state: State) -> State:
    """From diffusers' names and shapes, the older ones too, to DDIM's."""
    top = max((int(found[1]) for name in state if (found := re.match(r"up_blocks\.(\d+)\.", name))), default=0)
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in NAMES + OLDER_NAMES:
            name = _replaced(name, theirs, ours)
        is_linear = PROJECTION.search(name) and tensor.ndim == 2
        renamed[_turned(name, top)] = tensor[:, :, None, None] if is_linear else tensor      # (C, C) -> (C, C, 1, 1)
    return renamed


def to_diffusers_names(state: State) -> State:
    """The inverse of ``to_ddim_names``, under the present names."""
    top = max((int(found[1]) for name in state if (found := re.match(r"up\.(\d+)\.", name))), default=0)
    renamed = {}
    for name, tensor in state.items():
        is_linear, name = PROJECTION.search(name), _turned(name, top)
        for ours, theirs in NAMES:
            name = _replaced(name, ours, theirs)
        renamed[name] = tensor[:, :, 0, 0] if is_linear else tensor
    return renamed


PROJECTION = re.compile(r"\.(q|k|v|proj_out)\.weight$")        # of attention, by DDIM's names


def _replaced(name: str, piece: str, other: str) -> str:
    return f".{name}".replace(f".{piece}.", f".{other}.")[1:]


def _turned(name: str, top: int) -> str:
    """DDIM's name with the up side numbered from the other end."""
    return re.sub(r"^up\.(\d+)", lambda found: f"up.{top - int(found[1])}", name)
