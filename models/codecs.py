"""Between 8-bit pixels and what is diffused."""

from pathlib import Path

import torch
from torch import Tensor

from configs.network import check_halvings
from configs.pipelines import takes_text, unet_settings, vae_settings
from models.vae import VAE
from utils.errors import DataError, UserError
from utils.hub import local_folder

LOGIT_LAMBDA = 1e-6


class Pixels:
    """DDIM's data transforms: what is diffused are the pixels themselves.

    Args:
        data: The ``data`` section of a configuration.

    Attributes:
        shape: Of an encoded image, (C, H, W).
        bounded: Whether encoded images lie in [-1, 1] or in it, so that estimates may be clipped to it.
    """

    def __init__(self, data):
        self.data, self.shape, self.bounded = data, data.shape, not data.logit_transform

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """uint8 (B, C, H, W) to the float range of the chain.

        Args:
            images: Pixels 0..255.
            generator: Source of the dequantisation noise, on the images' device; None: no such noise is added.
        """
        data, x = self.data, images.float() / 255
        if data.uniform_dequantization and generator is not None:
            x = x * (255 / 256) + torch.rand(x.shape, generator=generator, device=x.device) / 256
        if data.gaussian_dequantization and generator is not None:
            x = x + 0.01 * torch.randn(x.shape, generator=generator, device=x.device)
        if data.rescaled:
            x = 2 * x - 1
        if data.logit_transform:
            x = torch.logit(LOGIT_LAMBDA + (1 - 2 * LOGIT_LAMBDA) * x.clamp(0, 1))
        return x

    def decode(self, x: Tensor) -> Tensor:
        """The inverse without dequantisation, clamped to [0, 1], (B, C, H, W)."""
        if self.data.logit_transform:
            x = (torch.sigmoid(x) - LOGIT_LAMBDA) / (1 - 2 * LOGIT_LAMBDA)
        if self.data.rescaled:
            x = (x + 1) / 2
        return x.clamp(0, 1)


def make_codec(config):
    """The codec of a configuration: the pixels, or the latents of a pipeline that has an autoencoder.

    Raises:
        UserError, DataError: A pipeline folder that is missing, or images that do not fit its autoencoder or its U-Net.
    """
    if config.model.arch != "diffusers":
        return Pixels(config.data)
    folder = local_folder(config.model.pretrained)
    codec = VAE(folder, config.data) if vae_settings(folder) else Pixels(config.data)
    _check_unet(folder, config.data, codec)
    return codec


def _check_unet(folder: Path, data, codec) -> None:
    """Refuse what the U-Net of a pipeline would only refuse when it is called, and not in one line."""
    unet, given = unet_settings(folder), codec.shape[0]
    taken, made = (unet.get(key, 4 if takes_text(unet) else 3) for key in ("in_channels", "out_channels"))
    if taken != given and isinstance(codec, Pixels):
        raise UserError(f"data.channels {given}: the U-Net of {folder} takes images of {taken} channels")
    if taken != given or made not in (given, 2 * given):
        raise DataError(f"{folder}: what is diffused has {given} channels, the U-Net takes {taken} and gives {made}; "
                        "networks that are shown more than the noisy image, for inpainting or editing, are not known "
                        "here")
    blocks = unet.get("down_block_types")
    if takes_text(unet) or not isinstance(blocks, list):                 # those for text fit their sizes as they go
        return
    try:
        check_halvings(data, len(blocks) + getattr(codec, "factor", 1).bit_length() - 1, f"the U-Net of {folder}")
    except ValueError as error:
        raise UserError(str(error)) from None
