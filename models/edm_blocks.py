"""What EDM's two networks (Karras et al., 2206.00364, appendix F.4) have in common, by its state-dict names.

Notation: B batch, C channels, H x W pixels, E width of the embedding.
"""

import logging
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.recompute import Recomputing
from models.resampling import Resample, ResampledConv
from models.unet import Dropout

log = logging.getLogger(__name__)


class BlockStyle(NamedTuple):
    """Where SongUNet and DhariwalUNet differ in their blocks."""

    norm_eps: float
    residual_scale: float            # of every sum with a skip connection
    adaptive_scale: bool             # the embedding scales as well as shifts
    head_width: int | None           # channels of an attention head; None: one head of them all
    project_resampled: bool          # 1x1 convolution on the skip connection of blocks that resample
    taps: tuple[int, ...]


def group_norm(width: int, eps: float) -> nn.GroupNorm:
    """min(32, C/4) groups.

    Raises:
        ValueError: A width that they do not divide.
    """
    groups = max(1, min(32, width // 4))
    if width % groups:
        raise ValueError(f"{width} channels cannot be normalised in {groups} groups; take a multiple of 32 for "
                         "model_channels")
    return nn.GroupNorm(groups, width, eps)


# -------------------------------------------------------------------------------------------------------------- blocks


class UNetBlock(nn.Module):
    """Two convolutions with the embedding between them, a skip connection, and self-attention where it is asked for.

        h = conv0(silu(norm0(x))),  h = conv1(dropout(silu(norm1(h) + a))),  x = (h + skip(x)) c

    (B, C, H, W) -> (B, C', H, W), or sides doubled or halved.

    Args:
        resampling: None, "up" or "down", before the weights.
        attention: Where ``style.head_width`` is more than C', there is none all the same (``has_attention`` False).

    Raises:
        ValueError: A width that cannot be normalised, or divided into heads.
    """

    def __init__(self, width_in: int, width_out: int, emb_width: int, *, dropout: float, style: BlockStyle,
                 resampling: str | None = None, attention: bool = False):
        super().__init__()
        self.style = style
        self.norm0 = group_norm(width_in, style.norm_eps)
        self.conv0 = _convolution(width_in, width_out, 3, style, resampling)
        self.affine = nn.Linear(emb_width, width_out * (2 if style.adaptive_scale else 1))
        self.norm1 = group_norm(width_out, style.norm_eps)
        self.dropout = Dropout(dropout)
        self.conv1 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.skip = nn.Identity()                              # no parameters, so no name in the state dict
        if width_in != width_out or resampling and style.project_resampled:
            self.skip = _convolution(width_in, width_out, 1, style, resampling)
        elif resampling:
            self.skip = Resample(style.taps, up=resampling == "up")
        self.heads = width_out // style.head_width if attention and style.head_width else int(attention)
        if self.has_attention:
            if width_out % self.heads:
                raise ValueError(f"{width_out} channels cannot be divided into {self.heads} attention heads; take a "
                                 f"multiple of {style.head_width} for the widths of resolutions with attention")
            self.norm2 = group_norm(width_out, style.norm_eps)
            self.qkv = nn.Conv2d(width_out, 3 * width_out, 1)
            self.proj = nn.Conv2d(width_out, width_out, 1)

    @property
    def has_attention(self) -> bool:
        return self.heads > 0

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        c = self.style.residual_scale
        h = self.norm1_with(self.affine(emb)[:, :, None, None], self.conv0(F.silu(self.norm0(x))))
        h = self.conv1(self.dropout(F.silu(h)))                                              # (B, C', H', W')
        x = (h + self.skip(x)) * c
        return (self.proj(self.attend(self.norm2(x))) + x) * c if self.has_attention else x

    def norm1_with(self, a: Tensor, h: Tensor) -> Tensor:
        if not self.style.adaptive_scale:
            return self.norm1(h + a)
        scale, shift = a.chunk(2, dim=1)                                                     # (B, C', 1, 1) each
        return self.norm1(h) * (1 + scale) + shift

    def attend(self, h: Tensor) -> Tensor:
        """Self-attention over all pixels, scale d^-1/2. (B, C, H, W) -> (B, C, H, W).

        q, k and v are interleaved: channel (head d + c) 3 + j of ``qkv`` is channel c of q, k or v (j = 0, 1, 2). The
        rows of the weights are sorted rather than the activations, of which there are more. A product of rows gives
        them a last stride of 1, without which CUDA has no fused attention.
        """
        weight, bias = (_sorted_rows(tensor, self.heads) for tensor in (self.qkv.weight.flatten(1), self.qkv.bias))
        qkv = F.linear(h.flatten(2).mT, weight, bias)                                        # (B, HW, 3C)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)               # (B, heads, HW, d) each
        h_out = F.scaled_dot_product_attention(q, k, v)
        return h_out.transpose(1, 2).flatten(2).mT.unflatten(2, h.shape[2:])


def _sorted_rows(tensor: Tensor, heads: int) -> Tensor:
    """(3C, ...) with q, k, v varying fastest -> the same with all rows of q first, then of k, then of v."""
    return tensor.unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2)


def _convolution(width_in: int, width_out: int, size: int, style: BlockStyle, resampling: str | None) -> nn.Conv2d:
    if resampling:
        return ResampledConv(width_in, width_out, size, style.taps, up=resampling == "up")
    return nn.Conv2d(width_in, width_out, size, padding=size // 2)


# ------------------------------------------------------------------------------------------------------------- network


class EDMUNet(Recomputing, ABC):
    """Encoder and decoder of both networks. A subclass adds its embedding, its way in and its way out.

    ``enc`` and ``dec`` are named by the resolution of each stage for square images of side ``img_resolution``, such as
    ``enc.16x16_block0``; other shapes are possible, and keep these names.
    """

    def __init__(self, *, img_resolution: int, in_channels: int, label_dim: int, model_channels: int,
                 channel_mult: tuple[int, ...], channel_mult_emb: int, num_blocks: int,
                 attn_resolutions: tuple[int, ...], dropout: float, style: BlockStyle):
        super().__init__()
        self.in_channels, self.label_dim, self.num_blocks = in_channels, label_dim, num_blocks
        self.widths = [model_channels * mult for mult in channel_mult]
        self.resolutions = [img_resolution >> level for level in range(len(channel_mult))]
        self.emb_width = model_channels * channel_mult_emb
        self.attn_resolutions, self.style, self.dropout = attn_resolutions, style, dropout

    def block(self, width_in: int, width_out: int, **options) -> UNetBlock:
        return UNetBlock(width_in, width_out, self.emb_width, dropout=self.dropout, style=self.style, **options)

    def build_encoder(self, first_width: int) -> list[int]:
        """Fill ``enc``; returns the widths of the states that the encoder hands to the decoder."""
        self.enc = nn.ModuleDict()
        width, kept = first_width, []
        for level, resolution in enumerate(self.resolutions):
            name, attention = f"{resolution}x{resolution}", resolution in self.attn_resolutions
            if level == 0:
                self.enc[f"{name}_conv"] = nn.Conv2d(self.in_channels, first_width, 3, padding=1)
            else:
                self.enc[f"{name}_down"] = self.block(width, width, resampling="down")
                self.add_image_path(name, level, width)
            kept.append(width)
            for i in range(self.num_blocks):
                self.enc[f"{name}_block{i}"] = self.block(width, self.widths[level], attention=attention)
                width = self.widths[level]
                kept.append(width)
        return kept

    def build_decoder(self, kept: list[int]) -> None:
        self.dec = nn.ModuleDict()
        width = kept[-1]
        for level, resolution in reversed(list(enumerate(self.resolutions))):
            name, attention = f"{resolution}x{resolution}", resolution in self.attn_resolutions
            if level == len(self.resolutions) - 1:
                self.dec[f"{name}_in0"] = self.block(width, width, attention=True)
                self.dec[f"{name}_in1"] = self.block(width, width)
            else:
                self.dec[f"{name}_up"] = self.block(width, width, resampling="up")
            for i in range(self.num_blocks + 1):
                self.dec[f"{name}_block{i}"] = self.block(width + kept.pop(), self.widths[level],
                                                          attention=attention and self.attends_in_decoder(i))
                width = self.widths[level]
            self.add_output(name, level, width)
        self._warn_of_missing_attention()

    def add_image_path(self, name: str, level: int, width: int) -> None:
        """Modules of ``enc`` through which the image itself enters at a lower resolution."""

    @abstractmethod
    def attends_in_decoder(self, i: int) -> bool:
        """Whether block i of a level with attention has it."""

    def add_output(self, name: str, level: int, width: int) -> None:
        """Modules of ``dec`` that make an image of a level's last state."""

    def _warn_of_missing_attention(self) -> None:
        asked = [self.dec[f"{self.resolutions[-1]}x{self.resolutions[-1]}_in0"],
                 *(self.enc[f"{side}x{side}_block0"] for side in self.resolutions if side in self.attn_resolutions)]
        missing = {block.conv1.out_channels for block in asked if not block.has_attention}
        if missing:
            log.warning("no attention in blocks of %s channels, though it was asked for: heads have %d channels. Widen "
                        "model.model_channels to have it", " and ".join(map(str, sorted(missing))),
                        self.style.head_width)

    @abstractmethod
    def embed(self, t: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """Everything but the image, always computed in float32: (B, E)."""

    def label_vector(self, labels: Tensor | None, count: int) -> Tensor:
        """One-hot float32 (B, label_dim). A label of -1, and no labels at all, are zeros; vectors stay as they are."""
        if labels is None:
            return torch.zeros(count, self.label_dim, device=self.map_label.weight.device)
        if labels.is_floating_point():
            return labels.float()
        return (labels[:, None] == torch.arange(self.label_dim, device=labels.device)).float()

    def augment_vector(self, augment: Tensor | None, count: int) -> Tensor:
        """(B, augment_dim); None is zeros, so that its weights have a gradient: DDP and resuming count on one."""
        if augment is None:
            return torch.zeros(count, self.map_augment.in_features, device=self.map_augment.weight.device)
        return augment

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """The states to keep, the last one being the lowest."""
        kept, image = [], x
        for level, side in enumerate(self.resolutions):
            name = f"{side}x{side}"
            if level == 0:
                h = self.enc[f"{name}_conv"](x)
            else:
                h, image = self.join_image(name, self.run(self.enc[f"{name}_down"], h, emb), image)
            kept.append(h)
            for i in range(self.num_blocks):
                h = self.run(self.enc[f"{name}_block{i}"], h, emb)
                kept.append(h)
        return kept

    def join_image(self, name: str, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """The state with what ``add_image_path`` adds to it, and the image for the next level."""
        return h, image

    def decode_level(self, level: int, h: Tensor, kept: list[Tensor], emb: Tensor) -> Tensor:
        side = self.resolutions[level]
        name = f"{side}x{side}"
        for stage in ("in0", "in1") if level == len(self.resolutions) - 1 else ("up",):
            h = self.run(self.dec[f"{name}_{stage}"], h, emb)
        for i in range(self.num_blocks + 1):
            h = self.run(self.dec[f"{name}_block{i}"], torch.cat([h, kept.pop()], dim=1), emb)
        return h


def geometric_frequencies(count: int, endpoint: bool, device) -> Tensor:
    """10000^(-i/n), i = 0..count-1, with n = count - 1 if the last is to be 1/10000, else n = count; float32.

    The exponent is rounded before the power, as in the published networks: times reach 999, and the angle's last bits
    are seen.
    """
    exponent = torch.arange(count, dtype=torch.float32, device=device) / (count - endpoint)
    return (1 / 10000) ** exponent
