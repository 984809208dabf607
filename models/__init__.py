"""Networks by name, and the weights that they can be given."""

import re
from collections.abc import Callable

from torch import nn

from configs.schema import Config
from models.adm import ADMUNet
from models.adm_classifier import load_classifier
from models.codecs import make_codec
from models.dhariwal import DhariwalUNet
from models.ema import EMA, decay_of
from models.pretrained import build_pretrained
from models.song import SongUNet
from models.unet import UNet
from models.weights import (
    WeightsInfo,
    about_weights,
    load_profile,
    load_weights,
    stored_settings,
    weights_fingerprint,
)
from utils.errors import UserError

__all__ = ["EMA", "MODELS", "WeightsInfo", "about_weights", "build_model", "decay_of", "load_classifier",
           "load_profile", "load_weights", "make_codec", "stored_settings", "weights_fingerprint"]


def _unet(config: Config) -> UNet:
    keys = config.model.model_dump(exclude={"arch", "var_type"})
    return UNet(resolution=max(config.data.height, config.data.width), **keys)


def _adm(config: Config) -> ADMUNet:
    keys = config.model.model_dump(exclude={"arch", "channel_mult"})
    return ADMUNet(image_size=max(config.data.height, config.data.width),
                   channel_mult=config.model.multipliers(config.data), **keys)


def _edm(network: type[nn.Module]) -> Callable[[Config], nn.Module]:
    def build(config: Config) -> nn.Module:
        keys = config.model.model_dump(exclude={"arch"})
        channels = config.model.in_channels * (2 if config.diffusion.prediction == "iddpm" else 1)
        return network(img_resolution=max(config.data.height, config.data.width), out_channels=channels, **keys)
    return build


MODELS: dict[str, Callable[[Config], nn.Module]] = {"unet": _unet, "adm": _adm, "songunet": _edm(SongUNet),
                                                    "dhariwal": _edm(DhariwalUNet), "diffusers": build_pretrained}


def build_model(config: Config) -> nn.Module:
    """The network of ``config.model.arch``, initialised as its program has it.

    Its forward takes x (B, C, H, W) float, t (B,) float or long and the condition by name, such as ``labels`` long
    (B,); it returns F, (B, C or 2C, H, W). Names in its state dict are those of its program, without prefixes.

    Raises:
        UserError: It does not fit into memory.
    """
    try:
        return MODELS[config.model.arch](config)
    except (RuntimeError, MemoryError) as error:               # as torch says it where memory is short
        if isinstance(error, RuntimeError) and not re.search("allocate|overflow|memory", str(error)):
            raise
        raise UserError(f"the network of this configuration cannot be made here: {error or 'no memory'}") from None
