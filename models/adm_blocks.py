"""What ADM's networks are made of (guided-diffusion; 2105.05233), by its state-dict names.

Notation: B batch, C channels, H x W pixels, D width of the embedding of time and label.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.precision import without_autocast
from models.unet import Dropout, Upsample


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """cos(t w_i), sin(t w_i) with w_i = 10000^(-i / (dim // 2)): cosines first. (B,) -> (B, dim), always float32.

    The exponent is rounded to float32, as published; its exponential is computed in float64, because a processor's
    float32 exp may be an ulp off, and t = 1000 makes 3e-5 of the network's output of it.

    Args:
        t: Steps, float or integer, (B,).
        dim: Width of the result; an odd one ends with a zero.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / half)
    angles = t.float()[:, None] * exponent.double().exp().float()                            # (B, dim // 2)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))               # (B, dim)


class GroupNorm(nn.GroupNorm):
    """32 groups, computed in float32 under autocast (on a CPU without a copy of x) and cast back."""

    def __init__(self, width: int):
        super().__init__(32, width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


def zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ResBlock(nn.Module):
    """skip(x) + f(x, emb), at another resolution where ``resample`` is given. (B, C, H, W) -> (B, C', H', W').

    Args:
        resample: ``halve`` or ``double``, put before the first convolution and before the skip.
        scale_shift: The embedding scales and shifts the second normalisation's result (FiLM), else it is added before.
    """

    def __init__(self, width_in: int, width_out: int, emb_width: int, dropout: float, scale_shift: bool,
                 resample: Callable | None = None):
        super().__init__()
        self.resample, self.scale_shift = resample, scale_shift
        self.in_layers = nn.Sequential(GroupNorm(width_in), nn.SiLU(), nn.Conv2d(width_in, width_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_width, width_out * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(GroupNorm(width_out), nn.SiLU(), Dropout(dropout),
                                        zeroed(nn.Conv2d(width_out, width_out, 3, padding=1)))
        self.skip_connection = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = activation(norm(x))                                                              # (B, C, H, W)
        if self.resample:
            h, x = self.resample(h), self.resample(x)                                        # (B, C, H', W')
        h = conv(h)                                                                          # (B, C', H', W')
        with without_autocast(x):
            e = self.emb_layers(emb)[:, :, None, None]                                       # (B, C' or 2C', 1, 1)
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = e.to(h.dtype).chunk(2, dim=1)                                     # (B, C', 1, 1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + e.to(h.dtype))
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


# Shape and order of the 3C channels of qkv: how they unflatten, and the permutation of (B, HW, ..) that puts the three
# parts first and the heads before the pixels. Both orders have weights of one shape.
LEGACY_ORDER = ((-1, 3), (3, 0, 2, 1, 4))                      # head by head, in each q, k, v
NEW_ORDER = ((3, -1), (2, 0, 3, 1, 4))                         # q, k, v, in each head by head


def attend(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with d = C / heads. (B, N, 3C) -> (B, N, C), head by head."""
    shape, order = NEW_ORDER if new_order else LEGACY_ORDER
    d = qkv.shape[2] // (3 * heads)
    q, k, v = qkv.unflatten(2, (*shape, d)).permute(order)                                   # (B, heads, N, d) each
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def pointwise(layer: nn.Conv1d, x: Tensor) -> Tensor:
    """A 1x1 convolution of rows of channels, which in channels_last copies nothing. (B, N, C) -> (B, N, C')."""
    return F.linear(x, layer.weight[:, :, 0], layer.bias)


class Attention(nn.Module):
    """x + self-attention over all pixels. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width: int, heads: int, new_order: bool):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = GroupNorm(width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = zeroed(nn.Conv1d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x).flatten(2).mT                                                    # (B, HW, C)
        h = attend(pointwise(self.qkv, rows), self.heads, self.new_order)                    # (B, HW, C)
        return x + pointwise(self.proj_out, h).mT.unflatten(2, x.shape[2:])                  # (B, C, H, W)


class Downsample(nn.Module):
    """Halve the sides: a strided convolution padded on all sides, or average pooling."""

    def __init__(self, width: int, with_conv: bool):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1) if with_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Stage(nn.Sequential):
    """One entry of ``input_blocks``, ``middle_block`` or ``output_blocks``; only residual blocks see the embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class Parts:
    """Makes the blocks of one network; what all of them share is said here once.

    Raises:
        ValueError: From ``attention``: the width does not divide into heads.
    """

    def __init__(self, *, emb_width: int, dropout: float, use_scale_shift_norm: bool, resblock_updown: bool,
                 conv_resample: bool, num_head_channels: int, use_new_attention_order: bool):
        self.shared = {"emb_width": emb_width, "dropout": dropout, "scale_shift": use_scale_shift_norm}
        self.resblock_updown, self.conv_resample = resblock_updown, conv_resample
        self.num_head_channels, self.new_order = num_head_channels, use_new_attention_order

    def block(self, width_in: int, width_out: int, resample: Callable | None = None) -> ResBlock:
        return ResBlock(width_in, width_out, resample=resample, **self.shared)

    def attention(self, width: int, heads: int) -> Attention:
        per_head = self.num_head_channels if self.num_head_channels != -1 else width // heads
        if width % per_head or (self.num_head_channels == -1 and width % heads):
            raise ValueError(f"attention of width {width} does not divide into heads: num_heads {heads}, "
                             f"num_head_channels {self.num_head_channels}")
        return Attention(width, width // per_head, self.new_order)

    def down(self, width: int) -> nn.Module:
        return self.block(width, width, halve) if self.resblock_updown else Downsample(width, self.conv_resample)

    def up(self, width: int) -> nn.Module:
        return self.block(width, width, double) if self.resblock_updown else Upsample(width, self.conv_resample)
