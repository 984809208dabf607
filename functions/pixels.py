"""Between 8-bit pixels and the range in which the chain runs (DDIM's data transforms), and random mirroring."""

import torch
from torch import Tensor

LOGIT_LAMBDA = 1e-6


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2, (B, C, H, W)."""
    mirrored = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def to_model_range(images: Tensor, data, generator: torch.Generator | None = None) -> Tensor:
    """uint8 (B, C, H, W) to the float range of the chain.

    Args:
        images: Pixels 0..255.
        data: Section with uniform_dequantization, gaussian_dequantization, rescaled, logit_transform.
        generator: Source of the dequantisation noise, on the images' device.
    """
    x = images.float() / 255
    if data.uniform_dequantization:
        x = x * (255 / 256) + torch.rand(x.shape, generator=generator, device=x.device) / 256
    if data.gaussian_dequantization:
        x = x + 0.01 * torch.randn(x.shape, generator=generator, device=x.device)
    if data.rescaled:
        x = 2 * x - 1
    if data.logit_transform:
        x = torch.logit(LOGIT_LAMBDA + (1 - 2 * LOGIT_LAMBDA) * x.clamp(0, 1))
    return x


def from_model_range(x: Tensor, data) -> Tensor:
    """The inverse without dequantisation, clamped to [0, 1], (B, C, H, W)."""
    if data.logit_transform:
        x = (torch.sigmoid(x) - LOGIT_LAMBDA) / (1 - 2 * LOGIT_LAMBDA)
    if data.rescaled:
        x = (x + 1) / 2
    return x.clamp(0, 1)


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] to 0..255 by rounding to nearest."""
    return (images * 255).round().to(torch.uint8)
