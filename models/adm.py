"""ADM, the U-Net of guided-diffusion (Dhariwal & Nichol 2021, 2105.05233), by its flags and its state-dict names.

DDPM-IP's and ADM-ES's networks are this one. Notation: B batch, H x W pixels, M ``num_channels``, D = 4M width of the
embedding of time and label, R ``num_res_blocks``, L levels; a level is one resolution, numbered from the highest, and
has the width int(mult M). All states of the way down are kept and concatenated on the way up.

    input_blocks    convolution; for each level R blocks, then (not after the last) halving                    L (R+1)
    middle_block    block, attention, block
    output_blocks   for each level from the lowest R + 1 blocks; the last of them is followed by doubling      L (R+1)
    out             normalisation, SiLU, convolution

A network fresh from here outputs exactly 0: the last layer of every block, of every attention and of all starts at 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.adm_blocks import GroupNorm, Parts, Stage, timestep_embedding, zeroed
from models.precision import without_autocast
from models.recompute import Recomputing
from models.unet import embed_labels


class Encoder(Recomputing):
    """What the U-Net and the noisy classifier have in common: embedding, way down and middle.

    The arguments are guided-diffusion's flags (its ``script_util``), but for:

    Args:
        image_size: Longer side of the images; decides where ``attention_resolutions`` puts attention.
        channel_mult: Width of each level as a multiple of ``num_channels``, highest resolution first; 0.5 is possible.
        attention_resolutions: Sides with attention: level i has it if 2^i is image_size // side for one of them.
        num_heads: Heads of every attention, unless ``num_head_channels``, the width of a head, is not -1.
        num_classes: Rows of the label embedding; 0 for a network without classes.

    Raises:
        ValueError: A width is no multiple of 32, or does not divide into heads.
    """

    def __init__(self, *, image_size: int, in_channels: int, num_channels: int, num_res_blocks: int,
                 channel_mult: Sequence[float], attention_resolutions: Sequence[int], num_heads: int = 4,
                 num_head_channels: int = -1, use_scale_shift_norm: bool = True, resblock_updown: bool = False,
                 use_new_attention_order: bool = False, conv_resample: bool = True, dropout: float = 0.0,
                 num_classes: int = 0):
        super().__init__()
        self.in_channels, self.num_channels, emb_width = in_channels, num_channels, 4 * num_channels
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
        with without_autocast(t):
            emb = self.time_embed(timestep_embedding(t, self.num_channels).to(self.time_embed[0].weight.dtype))
            return emb if labels is None else emb + embed_labels(self.label_emb, labels)

    def encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The state after the middle, and the states that the way up takes."""
        kept = []
        for stage in self.input_blocks:
            x = self.run(stage, x, emb)
            kept.append(x)
        return self.run(self.middle_block, x, emb), kept


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
        heads = num_heads if num_heads_upsample == -1 else num_heads_upsample
        width, kept = self.widths[-1], [*self.kept]
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
            h = self.run(stage, torch.cat([h, kept.pop()], dim=1), emb)
        with without_autocast(x):
            return self.out(h.to(x.dtype))
