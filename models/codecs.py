"""Between 8-bit pixels and what is diffused."""

import torch
from torch import Tensor

from configs.pipelines import vae_settings
from models.vae import VAE
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
        UserError, DataError: A pipeline folder that is missing, or images that do not fit its autoencoder.
    """
    if config.model.arch != "diffusers":
        return Pixels(config.data)
    folder = local_folder(config.model.pretrained)
    return VAE(folder, config.data) if vae_settings(folder) else Pixels(config.data)
