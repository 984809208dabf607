"""8-bit images on their way to a network and back."""

import torch
from torch import Tensor


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2, (B, C, H, W)."""
    mirrored = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] to 0..255 by rounding to nearest."""
    return (images * 255).round().to(torch.uint8)
