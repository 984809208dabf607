"""DhariwalUNet: ADM's network (Dhariwal & Nichol, 2105.05233) as reimplemented by EDM (2206.00364), by EDM's names.

It is another network than models/adm.py: names, layout of q, k, v and class embedding differ, and neither's weights fit
the other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.edm_blocks import BlockStyle, EDMUNet, geometric_frequencies, group_norm
from models.precision import without_autocast

HEAD_WIDTH = 64                      # channels of an attention head; blocks with fewer have no attention
ZERO = ("conv1", "proj", "out_conv", "map_augment")            # layers that start at zero, by the end of their names


class DhariwalUNet(EDMUNet):
    """The raw network F that EDM's preconditioning is put around.

    Args:
        img_resolution: Side of the images; the longer one where they are not square.
        attn_resolutions: Resolutions with attention, in every block of both sides that has at least 64 channels.
        Others: As documented in configs/networks_edm.py.

    Raises:
        ValueError: A width that cannot be normalised, or divided into heads.
    """

    def __init__(self, *, img_resolution: int, in_channels: int, out_channels: int, label_dim: int = 0,
                 augment_dim: int = 0, model_channels: int = 192, channel_mult: tuple[int, ...] = (1, 2, 3, 4),
                 channel_mult_emb: int = 4, num_blocks: int = 3, attn_resolutions: tuple[int, ...] = (32, 16, 8),
                 dropout: float = 0.10):
        super().__init__(
            img_resolution=img_resolution, in_channels=in_channels, label_dim=label_dim,
            model_channels=model_channels, channel_mult=channel_mult, channel_mult_emb=channel_mult_emb,
            num_blocks=num_blocks, attn_resolutions=attn_resolutions, dropout=dropout,
            style=BlockStyle(norm_eps=1e-5, residual_scale=1.0, adaptive_scale=True, head_width=HEAD_WIDTH,
                             project_resampled=False, taps=(1, 1)))
        self.model_channels = model_channels
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(model_channels, self.emb_width)
        self.map_layer1 = nn.Linear(self.emb_width, self.emb_width)
        self.map_label = nn.Linear(label_dim, self.emb_width, bias=False) if label_dim else None
        self.build_decoder(self.build_encoder(self.widths[0]))
        self.out_norm = group_norm(self.widths[0], self.style.norm_eps)
        self.out_conv = nn.Conv2d(self.widths[0], out_channels, 3, padding=1)
        self.zero_last_layers()

    def attends_in_decoder(self, i: int) -> bool:
        return True

    def zero_last_layers(self) -> None:
        """PyTorch's default weights, but zeros where a branch ends, and N(0, 1) for classes."""
        for path, module in self.named_modules():
            if path.endswith(ZERO):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)

    def embed(self, t: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        with without_autocast(t):
            dtype = self.map_layer0.weight.dtype
            angles = t.float().outer(geometric_frequencies(self.model_channels // 2, False, t.device))
            emb = torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype)                   # (B, M)
            if self.map_augment is not None:
                emb = emb + self.map_augment(self.augment_vector(augment, len(t)).to(dtype))
            emb = self.map_layer1(F.silu(self.map_layer0(emb)))
            if self.map_label is not None:
                emb = emb + self.map_label(self.label_vector(labels, len(t)).to(dtype))
            return F.silu(emb)                                                               # (B, E)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """F(x, t); arguments and result as in ``models.song.SongUNet.forward``."""
        emb = self.embed(t, labels, augment)
        kept = self.encode(x, emb)
        h = kept[-1]
        for level in reversed(range(len(self.resolutions))):
            h = self.decode_level(level, h, kept, emb)
        return self.out_conv(F.silu(self.out_norm(h)))
