"""DDIM's network as diffusers' ``UNet2DModel``: the same numbers under its names. The inverse of ``formats.diffusers``.

diffusers numbers the up side from the lowest resolution, DDIM from the highest; its attention has linear layers where
DDIM has 1x1 convolutions.
"""

import re

from torch import Tensor, nn

from utils.errors import UserError
from utils.hub import needs_package

_NAMES = [(re.compile(pattern), name) for pattern, name in (
    (r"^temb\.dense\.0\.", "time_embedding.linear_1."),
    (r"^temb\.dense\.1\.", "time_embedding.linear_2."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"^mid\.block_1\.", "mid_block.resnets.0."),
    (r"^mid\.attn_1\.", "mid_block.attentions.0."),
    (r"^mid\.block_2\.", "mid_block.resnets.1."),
    (r"^(down|up)\.", r"\1_blocks."),
    (r"\.block\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.temb_proj\.", ".time_emb_proj."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.q\.", r"\1.to_q."),
    (r"(attentions\.\d+)\.k\.", r"\1.to_k."),
    (r"(attentions\.\d+)\.v\.", r"\1.to_v."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)]


def unet_keys(config) -> dict:
    """Arguments of ``UNet2DModel`` for a configuration with ``arch: unet``.

    Raises:
        UserError: diffusers has no network that computes the same.
    """
    model, data = config.model, config.data
    if not model.resamp_with_conv:
        raise UserError("--export: model.resamp_with_conv false; diffusers has no U-Net that resamples by averages")
    if model.num_classes:
        raise UserError(f"--export: model.num_classes {model.num_classes}; diffusers' DDIMPipeline asks for no "
                        "classes, and its U-Net knows no missing label")
    side, attends = max(data.height, data.width), []
    for _ in model.ch_mult:
        attends.append(side in model.attn_resolutions)
        side //= 2
    return {
        "sample_size": data.height if data.height == data.width else (data.height, data.width),
        "in_channels": model.in_channels, "out_channels": model.out_ch, "layers_per_block": model.num_res_blocks,
        "block_out_channels": tuple(model.ch * mult for mult in model.ch_mult),
        "down_block_types": tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        "up_block_types": tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in attends[::-1]),
        "attention_head_dim": None, "downsample_padding": 0, "dropout": model.dropout, "flip_sin_to_cos": False,
        "freq_shift": 1, "norm_eps": 1e-6, "norm_num_groups": 32,
    }


def to_diffusers(config, state: dict[str, Tensor]) -> nn.Module:
    """diffusers' ``UNet2DModel`` with the weights of a network of ``arch: unet``."""
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise needs_package(error, "--export") from None
    unet = UNet2DModel(**unet_keys(config))
    top = len(config.model.ch_mult) - 1
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^up\.(\d+)", lambda found: f"up.{top - int(found[1])}", name)
        for pattern, replacement in _NAMES:
            name = pattern.sub(replacement, name)
        is_linear = re.search(r"attentions\.\d+\.to_\w+(\.0)?\.weight$", name)
        renamed[name] = (tensor[:, :, 0, 0] if is_linear else tensor).detach().cpu().contiguous()
    unet.load_state_dict(renamed)
    return unet.eval()
