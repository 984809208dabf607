"""DDIM's network as diffusers' ``UNet2DModel``: the same numbers under its names."""

from torch import Tensor, nn

from models.formats.diffusers import to_diffusers_names
from utils.errors import UserError
from utils.hub import needs_package


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
    renamed = to_diffusers_names(state)
    unet.load_state_dict({name: tensor.detach().cpu().contiguous() for name, tensor in renamed.items()})
    return unet.eval()
