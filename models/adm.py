"""ADM, the U-Net of guided-diffusion (Dhariwal & Nichol 2021, 2105.05233), by its flags and its state-dict names.

DDPM-IP's and ADM-ES's networks are this one. Notation: B batch, C channels, H x W pixels, M ``num_channels``, D = 4M
width of the embedding of time and label, R ``num_res_blocks``, L levels; a level is one resolution, numbered from the
highest, and has the width int(mult M). All states of the way down are kept and concatenated on the way up.

    input_blocks    convolution; for each level R blocks, then (not after the last) halving         1 + L R + L - 1
    middle_block    block, attention, block
    output_blocks   for each level from the lowest R + 1 blocks; the last of them is followed by doubling      L (R+1)
    out             normalisation, SiLU, convolution

A network fresh from here outputs exactly 0: the last layer of every block, of every attention and of all starts at 0.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.unet import Dropout


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
    """32 groups, computed in the type of its weights, which autocast leaves at float32, and cast back."""

    def __init__(self, width: int):
        super().__init__(32, width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def full_precision(x: Tensor) -> torch.autocast:
    """Context without autocast: an embedding in bf16 could not tell neighbouring steps apart."""
    return torch.autocast(x.device.type, enabled=False)


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
        with full_precision(x):
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


class Upsample(nn.Module):
    """Double the sides by nearest neighbour, then convolve if ``with_conv``."""

    def __init__(self, width: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(double(x))


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


class Encoder(nn.Module):
    """What the U-Net and the noisy classifier have in common: embedding, way down and middle.

    The arguments are guided-diffusion's flags (its ``script_util``), but for:

    Args:
        image_size: Longer side of the images; decides where ``attention_resolutions`` puts attention.
        channel_mult: Width of each level as a multiple of ``num_channels``, highest resolution first; 0.5 is possible.
        attention_resolutions: Sides with attention: level i has it if 2^i is image_size // side for one of them.
        num_heads: Heads of every attention, unless ``num_head_channels``, the width of a head, is not -1.
        num_classes: Rows of the label embedding; 0 for a network without classes.

    Attributes:
        checkpointing: Set to True to recompute each stage in the backward pass instead of keeping its activations:
            the same gradients in less memory, for about a third more time.

    Raises:
        ValueError: A width is no multiple of 32, or does not divide into heads.
    """

    def __init__(self, *, image_size: int, in_channels: int, num_channels: int, num_res_blocks: int,
                 channel_mult: Sequence[float], attention_resolutions: Sequence[int], num_heads: int = 4,
                 num_head_channels: int = -1, use_scale_shift_norm: bool = True, resblock_updown: bool = False,
                 use_new_attention_order: bool = False, conv_resample: bool = True, dropout: float = 0.0,
                 num_classes: int = 0):
        super().__init__()
        self.checkpointing = False
        self.num_channels, emb_width = num_channels, 4 * num_channels
        self.widths = [int(mult * num_channels) for mult in channel_mult]
        factors = {image_size // side for side in attention_resolutions}
        self.has_attention = [2**i in factors for i in range(len(channel_mult))]
        self.parts = Parts(emb_width=emb_width, dropout=dropout, use_scale_shift_norm=use_scale_shift_norm,
                           resblock_updown=resblock_updown, conv_resample=conv_resample,
                           num_head_channels=num_head_channels, use_new_attention_order=use_new_attention_order)

        self.time_embed = nn.Sequential(nn.Linear(num_channels, emb_width), nn.SiLU(), nn.Linear(emb_width, emb_width))
        self.label_emb = nn.Embedding(num_classes, emb_width) if num_classes else None

        width = self.widths[0]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, width, 3, padding=1))])
        self.kept = [width]                                    # widths of the states that forward keeps
        for i, width_out in enumerate(self.widths):
            for _ in range(num_res_blocks):
                self.input_blocks.append(self._stage(i, width, num_heads))
                width = width_out
                self.kept.append(width)
            if i < len(self.widths) - 1:
                self.input_blocks.append(Stage(self.parts.down(width)))
                self.kept.append(width)
        self.middle_block = Stage(self.parts.block(width, width), self.parts.attention(width, num_heads),
                                  self.parts.block(width, width))

    def _stage(self, level: int, width_in: int, heads: int) -> Stage:
        width = self.widths[level]
        attention = [self.parts.attention(width, heads)] if self.has_attention[level] else []
        return Stage(self.parts.block(width_in, width), *attention)

    def embed(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B,) and, with classes, (B,) -> (B, D), in the type of the weights."""
        if (labels is None) != (self.label_emb is None):
            raise ValueError("labels are needed by a network with classes" if labels is None else
                             "labels were given to a network without classes")
        with full_precision(t):
            emb = self.time_embed(timestep_embedding(t, self.num_channels).to(self.time_embed[0].weight.dtype))
            if labels is None:
                return emb
            return emb + self.label_emb(labels.clamp(min=0)) * (labels >= 0)[:, None]

    def encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The state after the middle, and the states that the way up takes."""
        kept = []
        for stage in self.input_blocks:
            x = self._run(stage, x, emb)
            kept.append(x)
        return self._run(self.middle_block, x, emb), kept

    def _run(self, stage: Stage, x: Tensor, emb: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, x, emb, use_reentrant=False)
        return stage(x, emb)


class ADMUNet(Encoder):
    """Predict noise (or x_0) and, with ``learn_sigma``, where the variance lies in its range.

    Args:
        learn_sigma: Twice as many output channels, the second half for the variance.
        num_heads_upsample: Heads in ``output_blocks``; -1: as ``num_heads``. ``num_head_channels`` wins over both.
        Others: Those of ``Encoder``.
    """

    def __init__(self, *, in_channels: int, num_res_blocks: int, num_heads: int = 4, num_heads_upsample: int = -1,
                 learn_sigma: bool = False, **options):
        super().__init__(in_channels=in_channels, num_res_blocks=num_res_blocks, num_heads=num_heads, **options)
        heads, width, kept = num_heads if num_heads_upsample == -1 else num_heads_upsample, self.widths[-1], [*self.kept]
        self.output_blocks = nn.ModuleList()
        for i, width_out in reversed(list(enumerate(self.widths))):
            for _ in range(num_res_blocks + 1):
                self.output_blocks.append(self._stage(i, width + kept.pop(), heads))
                width = width_out
            if i > 0:
                self.output_blocks[-1].append(self.parts.up(width))
        self.out = nn.Sequential(GroupNorm(width), nn.SiLU(), zeroed(
            nn.Conv2d(width, in_channels * (2 if learn_sigma else 1), 3, padding=1)))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """F(x_t, t).

        Args:
            x: Noisy images, (B, in_channels, H, W); sides divisible by 2^(L - 1).
            t: Steps, float or integer, (B,).
            labels: Classes, long (B,), -1 for none; given if and only if the network has classes.

        Returns:
            (B, in_channels, H, W), with ``learn_sigma`` (B, 2 in_channels, H, W); in x's type also under autocast.

        Raises:
            ValueError: Labels are missing, or the network has no classes.
        """
        emb = self.embed(t, labels)                                                          # (B, D)
        h, kept = self.encode(x, emb)
        for stage in self.output_blocks:
            h = self._run(stage, torch.cat([h, kept.pop()], dim=1), emb)
        with full_precision(x):
            return self.out(h.to(x.dtype))
