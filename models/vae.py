"""Latents: what an autoencoder of diffusers makes of images, scaled as its pipeline diffuses them.

    x_0 = (z - shift) * scale,   z ~ N(mean, std^2) from the encoder                          (2112.10752, section 3.1)

shift and scale are the autoencoder's ``shift_factor`` and ``scaling_factor``; or its ``latents_mean`` and
``scaling_factor / latents_std``, where it has those.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from configs.pipelines import vae_factor, vae_folder, vae_settings
from models.pretrained import check_size, load_whole
from utils.errors import DataError, UserError
from utils.hub import needs_package

# Keys of ``data`` that say how pixels are diffused, and what an autoencoder takes them to be.
PIXELS_ALONE = {"rescaled": True, "uniform_dequantization": False, "gaussian_dequantization": False}


class VAE:
    """The codec of latent models. Weights are loaded when first needed, and may leave memory in between.

    Args:
        folder: Of the pipeline.
        data: The ``data`` section of a configuration: size of the images.

    Attributes:
        shape: Of an encoded image, (C, H / factor, W / factor).
        bounded: False: latents lie in no range that estimates could be clipped to.
        factor: Pixels along the side of a latent.

    Raises:
        UserError: Images of a size that the autoencoder cannot halve, or not in colour; a setting that only diffusion
            of pixels has. DataError: No autoencoder.
    """

    bounded = False

    def __init__(self, folder: Path, data):
        self.folder, settings = vae_folder(folder), vae_settings(folder)
        self.factor = vae_factor(settings)
        for key, value in PIXELS_ALONE.items():
            if getattr(data, key) != value:
                raise UserError(f"data.{key} {getattr(data, key)} is for diffusion of pixels, not of latents; leave it "
                                f"at {json.dumps(value)}")
        for side in (data.height, data.width):
            if side % self.factor:
                raise UserError(f"data.image_size {side} is not a multiple of {self.factor}, the pixels of one latent")
        if data.channels != settings.get("in_channels", 3):
            raise UserError(f"data.channels {data.channels}: the autoencoder of {folder} takes images of "
                            f"{settings.get('in_channels', 3)} channels")
        channels = settings.get("latent_channels", 4)
        self.shape = channels, data.height // self.factor, data.width // self.factor
        mean, std = settings.get("latents_mean"), settings.get("latents_std")
        self.scale = settings.get("scaling_factor", 0.18215) / _column(std, 1.0)
        self.shift = _column(mean, settings.get("shift_factor") or 0.0)
        self._vae = None

    def network(self, device) -> torch.nn.Module:
        """diffusers' AutoencoderKL in float32: SDXL's overflows in float16."""
        if self._vae is None:
            try:
                from diffusers import AutoencoderKL
            except ImportError as error:
                raise needs_package(error, "model.arch diffusers") from None
            try:
                check_size(AutoencoderKL, vae_settings(self.folder.parent), self.folder)
                vae = load_whole(AutoencoderKL, self.folder)
            except DataError:
                raise
            except Exception as error:        # OSError, ValueError, SafetensorError, RuntimeError: whatever files do
                raise DataError(f"{self.folder}: not loaded: {' '.join(str(error).split())[:300]}") from None
            self._vae = vae.float().requires_grad_(False).eval()
        return self._vae.to(device)

    def release(self) -> None:
        """Let the weights leave memory; they are loaded again if they are needed again."""
        self._vae = None

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of z for uint8 (B, C, H, W), one image at a time: (B, 2, c, h, w) float32."""
        vae = self.network(images.device)
        made = [vae.encode(2 * (image[None].float() / 255) - 1).latent_dist for image in images]
        return torch.stack([torch.cat([each.mean for each in made]), torch.cat([each.std for each in made])], 1)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x_0 of images, or of their moments, (B, c, h, w).

        Args:
            images: uint8 (B, C, H, W), or float (B, 2, c, h, w) from ``moments``.
            generator: Draws z; None: its mean.
        """
        moments = images.float() if images.is_floating_point() else self.moments(images)
        mean, std = moments.unbind(1)
        z = mean
        if generator is not None:
            z = mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)
        return (z - self._on(self.shift, z)) * self._on(self.scale, z)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Images in [0, 1], (B, C, H, W) float32, one at a time, so that a batch takes no more memory."""
        vae, z = self.network(x.device), x.float() / self._on(self.scale, x) + self._on(self.shift, x)
        images = torch.cat([vae.decode(each[None], return_dict=False)[0] for each in z])
        return (images / 2 + 0.5).clamp(0, 1)

    @staticmethod
    def _on(value, like: Tensor):
        return value.to(like.device) if isinstance(value, Tensor) else value


def _column(values: list | None, default: float):
    """A number for each channel as (C, 1, 1), or the one for all."""
    return default if values is None else torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
