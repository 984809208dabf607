"""Networks by name, and the weights that they can be given."""

from collections.abc import Callable

from torch import nn

from configs.schema import Config
from models.ema import EMA, make_ema
from models.unet import UNet
from models.weights import WeightsInfo, load_weights, weights_fingerprint
from utils.errors import choose

__all__ = ["EMA", "MODELS", "WeightsInfo", "build_model", "load_weights", "make_ema", "weights_fingerprint"]


def _unet(config: Config) -> UNet:
    return UNet(
        resolution=max(config.data.height, config.data.width),
        **config.model.model_dump(include={"in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks",
                                           "attn_resolutions", "dropout", "resamp_with_conv"}),
    )


MODELS: dict[str, Callable[[Config], nn.Module]] = {"unet": _unet}


def build_model(config: Config) -> nn.Module:
    """The network of ``config.model.arch`` with PyTorch's default initialisation, as DDIM has it.

    Its forward takes x (B, C, H, W) float and t (B,) float or long, and returns (B, C_out, H, W).

    Raises:
        UserError: ``model.arch`` is not in ``MODELS``.
    """
    return choose(MODELS, config.model.arch, "model.arch")(config)
