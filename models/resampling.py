"""Doubling and halving the sides of images inside EDM's networks (2206.00364), alone or with a convolution.

``taps`` are the weights f of a filter, [1, 1] or [1, 3, 3, 1]; its kernel, f f^T / (sum f)^2, is a buffer of the state
dict.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Resample(nn.Module):
    """Double or halve the sides. (B, C, H, W) -> (B, C, 2H, 2W) or (B, C, H/2, W/2).

    With [1, 1] that is nearest neighbour and the mean of 2 x 2.
    """

    def __init__(self, taps: tuple[int, ...], *, up: bool):
        super().__init__()
        self.up, self.is_box = up, tuple(taps) == (1, 1)
        self.register_buffer("resample_filter", resampling_kernel(taps))                     # (1, 1, m, m)

    def forward(self, x: Tensor) -> Tensor:
        return resample(x, None if self.is_box else self.resample_filter, self.up)


class ResampledConv(nn.Conv2d):
    """``Resample``, then a convolution; the kernel belongs to the convolution's own names."""

    def __init__(self, width_in: int, width_out: int, size: int, taps: tuple[int, ...], *, up: bool):
        super().__init__(width_in, width_out, size, padding=size // 2)
        self.up, self.is_box = up, tuple(taps) == (1, 1)
        self.register_buffer("resample_filter", resampling_kernel(taps))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(resample(x, None if self.is_box else self.resample_filter, self.up))


class FusedDownConv(nn.Conv2d):
    """A 3x3 convolution that keeps the margin which the halving after it needs; bias last. To (B, C', H/2, W/2)."""

    def __init__(self, width_in: int, width_out: int, taps: tuple[int, ...]):
        super().__init__(width_in, width_out, 3, padding=1 + (len(taps) - 1) // 2)
        self.register_buffer("resample_filter", resampling_kernel(taps))

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(x, self.weight, padding=self.padding)                                   # (B, C', H + m - 2, ...)
        h = F.conv2d(h, _depthwise(self.resample_filter, h), stride=2, groups=h.shape[1])
        return h + self.bias.to(h.dtype)[:, None, None]


def resampling_kernel(taps: tuple[int, ...]) -> Tensor:
    f = torch.tensor(taps, dtype=torch.float32)
    return (f.outer(f) / f.sum()**2)[None, None]                                             # (1, 1, m, m)


def resample(x: Tensor, kernel: Tensor | None, up: bool) -> Tensor:
    """With no kernel: the box [1, 1]."""
    if kernel is None:
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if up else F.avg_pool2d(x, 2)
    padding, groups = (kernel.shape[-1] - 1) // 2, x.shape[1]
    if up:
        return F.conv_transpose2d(x, _depthwise(4 * kernel, x), stride=2, padding=padding, groups=groups)
    return F.conv2d(x, _depthwise(kernel, x), stride=2, padding=padding, groups=groups)


def _depthwise(kernel: Tensor, x: Tensor) -> Tensor:
    return kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)                                 # (C, 1, m, m)
