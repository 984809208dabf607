"""The U-Net of DDPM (Ho et al. 2020) with the state-dict names and the numbers of DDIM's PyTorch port.

Notation: B batch, C channels, H x W pixels, D = 4 ch width of the time embedding. A level is one resolution, numbered
from the highest; ``down.i`` and ``up.i`` are the two sides of level i. Every down-side state is kept as a skip and
concatenated on the way up.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.precision import without_autocast
from models.recompute import Recomputing


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """sin(t w_i), cos(t w_i) with w_i = 10000^(-i / (dim/2 - 1)), as DDPM: all sines first. Always float32.

    Args:
        t: Steps, float or integer, (B,).
        dim: Even width of the result, at least 4.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(index * (-math.log(10000) / (half - 1)))         # (B, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)                                    # (B, dim)


def group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=32, num_channels=width, eps=1e-6)


def embed_labels(table: nn.Embedding, labels: Tensor) -> Tensor:
    """A row for each label, zeros where it is -1, which means none. (B,) -> (B, D)."""
    return table(labels.clamp(min=0)) * (labels >= 0)[:, None].to(table.weight.dtype)


class TimeEmbedding(nn.Module):
    """Times, and labels where there are any, to SiLU-activated features: what every residual block wants.

    (B,) -> (B, 4 ch)
    """

    def __init__(self, ch: int):
        super().__init__()
        self.ch = ch
        self.dense = nn.ModuleList([nn.Linear(ch, 4 * ch), nn.Linear(4 * ch, 4 * ch)])

    def forward(self, t: Tensor, label_embedding: Tensor | None = None) -> Tensor:
        first, second = self.dense
        with without_autocast(t):
            h = second(F.silu(first(sinusoidal_embedding(t, self.ch).to(first.weight.dtype))))
            return F.silu(h if label_embedding is None else h + label_embedding)             # (B, D)


class Dropout(nn.Dropout):
    """``nn.Dropout``, with cheaper random numbers on a CPU: 16 bits for each value, four from one draw.

    There the rate is ``p`` rounded to a multiple of 2^-16, and what is kept is divided by the rounded share, in its
    own type.
    """

    def forward(self, x: Tensor) -> Tensor:
        kept = round(2**16 * (1 - self.p))
        if not self.training or x.device.type != "cpu" or not 0 < kept < 2**16:
            return super().forward(x)
        draws = torch.randint(-2**63, 2**63 - 1, (x.numel() // 4,), device=x.device)       # 4 divides x's size
        numbers = draws.view(torch.int16).as_strided(x.shape, x.stride())                    # -2^15 ... 2^15 - 1
        return x * (numbers < kept - 2**15).to(x.dtype).mul_(2**16 / kept)


class ResBlock(nn.Module):
    """x + f(x, temb), with a 1x1 convolution on x where the width changes. (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, width_in: int, width_out: int, temb_width: int, dropout: float):
        super().__init__()
        self.norm1 = group_norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.temb_proj = nn.Linear(temb_width, width_out)
        self.norm2 = group_norm(width_out)
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, 1)
        else:
            self.nin_shortcut = nn.Identity()                  # no parameters, so no name in the state dict

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))                                                # (B, C', H, W)
        h = h + self.temb_proj(temb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """x + single-head self-attention over all pixels. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = group_norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (conv(normed).flatten(2).mT.unsqueeze(1) for conv in (self.q, self.k, self.v))  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)            # scale C^-1/2; in channels_last nothing was copied
        h = h.squeeze(1).mT.unflatten(2, x.shape[2:])                                        # (B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halve the sides: a strided convolution padded below and to the right only, or average pooling."""

    def __init__(self, width: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the sides by nearest neighbour, then convolve if ``with_conv``."""

    def __init__(self, width: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one side of one resolution, each followed by attention or each not."""

    def __init__(self, blocks: list[ResBlock], attention: bool):
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(Attention(block.conv2.out_channels) for block in blocks if attention)

    def stage(self, i: int, h: Tensor, temb: Tensor) -> Tensor:
        h = self.block[i](h, temb)
        return self.attn[i](h) if self.attn else h


class Middle(nn.Module):
    def __init__(self, width: int, temb_width: int, dropout: float):
        super().__init__()
        self.block_1 = ResBlock(width, width, temb_width, dropout)
        self.attn_1 = Attention(width)
        self.block_2 = ResBlock(width, width, temb_width, dropout)

    def forward(self, h: Tensor, temb: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h, temb)), temb)


class UNet(Recomputing):
    """A network for x_t, whose output means what ``functions.prediction`` is told.

    Args:
        resolution: Longer side of the images; ``resolution / 2^i`` in ``attn_resolutions`` gives level i attention.
        Others: As documented in configs/networks.py.
    """

    def __init__(self, *, in_channels: int, out_ch: int, ch: int, ch_mult: tuple[int, ...], num_res_blocks: int,
                 attn_resolutions: tuple[int, ...], resolution: int, dropout: float, resamp_with_conv: bool,
                 num_classes: int = 0):
        super().__init__()
        temb_width, last = 4 * ch, len(ch_mult) - 1
        has_attention = [resolution // 2**i in attn_resolutions for i in range(len(ch_mult))]
        self.temb = TimeEmbedding(ch)
        if num_classes:
            self.label_emb = nn.Embedding(num_classes, temb_width)
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        width, skip_widths = ch, [ch]                          # widths of the states that forward keeps

        self.down = nn.ModuleList()
        for i, mult in enumerate(ch_mult):
            widths = [width] + [ch * mult] * num_res_blocks
            level = Level([ResBlock(*pair, temb_width, dropout) for pair in zip(widths, widths[1:], strict=False)],
                          has_attention[i])
            width = ch * mult
            skip_widths += [width] * num_res_blocks
            if i < last:
                level.downsample = Downsample(width, resamp_with_conv)
                skip_widths.append(width)
            self.down.append(level)

        self.mid = Middle(width, temb_width, dropout)

        self.up = nn.ModuleList()
        for i, mult in reversed(list(enumerate(ch_mult))):
            blocks = []
            for _ in range(num_res_blocks + 1):
                blocks.append(ResBlock(width + skip_widths.pop(), ch * mult, temb_width, dropout))
                width = ch * mult
            level = Level(blocks, has_attention[i])
            if i > 0:
                level.upsample = Upsample(width, resamp_with_conv)
            self.up.insert(0, level)

        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """F(x_t, t).

        Args:
            x: Noisy images, (B, in_channels, H, W); sides divisible by 2^(levels - 1).
            t: Steps, float or integer, (B,).
            labels: Of a class-conditional network, long (B,), -1 for none; None: none at all.

        Returns:
            (B, out_ch, H, W)
        """
        temb = self.temb(t, None if labels is None else embed_labels(self.label_emb, labels))  # (B, D)
        h = self.conv_in(x)                                                                  # (B, ch, H, W)
        skips = [h]
        for level in self.down:
            for i in range(len(level.block)):
                h = self.run(level.stage, i, h, temb)
                skips.append(h)
            if level is not self.down[-1]:
                h = level.downsample(h)                                                      # (B, C_i, H/2, W/2)
                skips.append(h)

        h = self.run(self.mid, h, temb)

        for level in reversed(self.up):
            for i in range(len(level.block)):
                h = self.run(level.stage, i, torch.cat([h, skips.pop()], dim=1), temb)
            if level is not self.up[0]:
                h = level.upsample(h)                                                        # (B, C_i, 2H, 2W)
        return self.conv_out(F.silu(self.norm_out(h)))                                       # (B, out_ch, H, W)
