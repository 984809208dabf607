"""diffusers' ``UNet2DModel`` folders, as far as they hold DDIM's network."""

import re
from pathlib import Path

from models.formats.common import State, StoredWeights, bare
from utils.errors import DataError
from utils.files import open_regular, read_settings
from utils.safe_load import load_torch

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
    state = _rename_diffusers(bare(_diffusers_tensors(folder), folder, "weights file"))
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
    if not file.is_file():
        return load_torch(file.with_suffix(".bin"))
    open_regular(file).close()                                 # a pipe or a device would never end
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
