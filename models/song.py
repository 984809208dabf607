"""SongUNet: DDPM++ and NCSN++ of Song et al. (2011.13456) as reimplemented by EDM (2206.00364), by EDM's names.

    DDPM++   embedding_type positional, channel_mult_noise 1, encoder_type standard, resample_filter [1, 1]
    NCSN++   embedding_type fourier,    channel_mult_noise 2, encoder_type residual, resample_filter [1, 3, 3, 1]

Notation: M model_channels, Q = M channel_mult_noise width of the noise embedding, E = M channel_mult_emb of the whole.
"""

from math import pi, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.edm_blocks import BlockStyle, EDMUNet, geometric_frequencies, group_norm
from models.precision import without_autocast
from models.resampling import FusedDownConv, Resample


class Positional(nn.Module):
    """sin(t w_i), cos(t w_i), w_i from 1 to 1/10000. (B,) -> (B, dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        return sines_and_cosines(t.float().outer(geometric_frequencies(self.dim // 2, True, t.device)))


class Fourier(nn.Module):
    """sin(2 pi f_i t), cos(2 pi f_i t) for frequencies f_i that were drawn once, 16 N(0, 1). (B,) -> (B, dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(dim // 2))

    def forward(self, t: Tensor) -> Tensor:
        return sines_and_cosines(t.float().outer(2 * pi * self.freqs.float()))


def sines_and_cosines(angles: Tensor) -> Tensor:
    return torch.cat([angles.sin(), angles.cos()], dim=1)


EMBEDDINGS = {"positional": Positional, "fourier": Fourier}
SMALL, QKV = 1e-5, sqrt(0.2)                                   # gains of initial weights, by a layer's name
GAINS = {"conv1": SMALL, "proj": SMALL, "aux_conv": SMALL, "qkv": QKV}


class SongUNet(EDMUNet):
    """The raw network F that EDM's preconditioning is put around.

    Args:
        img_resolution: Side of the images; the longer one where they are not square.
        attn_resolutions: Resolutions with attention: all blocks of the encoder, the last of the decoder.
        Others: As documented in configs/networks_edm.py.

    Raises:
        ValueError: A width that cannot be normalised.
    """

    def __init__(self, *, img_resolution: int, in_channels: int, out_channels: int, label_dim: int = 0,
                 augment_dim: int = 0, model_channels: int = 128, channel_mult: tuple[int, ...] = (1, 2, 2, 2),
                 channel_mult_emb: int = 4, num_blocks: int = 4, attn_resolutions: tuple[int, ...] = (16,),
                 dropout: float = 0.10, embedding_type: str = "positional", channel_mult_noise: int = 1,
                 encoder_type: str = "standard", decoder_type: str = "standard",
                 resample_filter: tuple[int, ...] = (1, 1)):
        super().__init__(
            img_resolution=img_resolution, in_channels=in_channels, label_dim=label_dim,
            model_channels=model_channels, channel_mult=channel_mult, channel_mult_emb=channel_mult_emb,
            num_blocks=num_blocks, attn_resolutions=attn_resolutions, dropout=dropout,
            style=BlockStyle(norm_eps=1e-6, residual_scale=sqrt(0.5), adaptive_scale=False, head_width=None,
                             project_resampled=True, taps=tuple(resample_filter)))
        self.out_channels, self.encoder_type, self.decoder_type = out_channels, encoder_type, decoder_type
        noise_width = model_channels * channel_mult_noise
        self.map_noise = EMBEDDINGS[embedding_type](noise_width)
        self.map_label = nn.Linear(label_dim, noise_width) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise_width, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(noise_width, self.emb_width)
        self.map_layer1 = nn.Linear(self.emb_width, self.emb_width)
        self.build_decoder(self.build_encoder(model_channels))
        self.apply_gains()

    def add_image_path(self, name: str, level: int, width: int) -> None:
        taps = self.style.taps
        if self.encoder_type == "skip":
            self.enc[f"{name}_aux_down"] = Resample(taps, up=False)
            self.enc[f"{name}_aux_skip"] = nn.Conv2d(self.in_channels, width, 1)
        if self.encoder_type == "residual":
            above = self.in_channels if level == 1 else self.widths[level - 2]
            self.enc[f"{name}_aux_residual"] = FusedDownConv(above, width, taps)

    def attends_in_decoder(self, i: int) -> bool:
        return i == self.num_blocks

    def add_output(self, name: str, level: int, width: int) -> None:
        if self.decoder_type == "skip" or level == 0:
            if self.decoder_type == "skip" and level < len(self.resolutions) - 1:
                self.dec[f"{name}_aux_up"] = Resample(self.style.taps, up=True)
            self.dec[f"{name}_aux_norm"] = group_norm(width, self.style.norm_eps)
            self.dec[f"{name}_aux_conv"] = nn.Conv2d(width, self.out_channels, 3, padding=1)

    def apply_gains(self) -> None:
        """Glorot's uniform weights, times the gain of ``GAINS``; no biases."""
        for path, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                gain = next((gain for name, gain in GAINS.items() if path.endswith(name)), 1.0)
                nn.init.xavier_uniform_(module.weight, gain)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, t: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        with without_autocast(t):
            dtype = self.map_layer0.weight.dtype
            emb = self.map_noise(t).to(dtype)                                                # (B, Q)
            if self.map_label is not None:
                vector = self.label_vector(labels, len(t)).to(dtype)
                emb = emb + self.map_label(vector * sqrt(self.label_dim))
            if self.map_augment is not None:
                emb = emb + self.map_augment(self.augment_vector(augment, len(t)).to(dtype))
            return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))                     # (B, E)

    def join_image(self, name: str, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        if self.encoder_type == "skip":
            image = self.enc[f"{name}_aux_down"](image)                                      # (B, in_channels, ...)
            return h + self.enc[f"{name}_aux_skip"](image), image
        if self.encoder_type == "residual":
            h = (h + self.enc[f"{name}_aux_residual"](image)) * sqrt(0.5)
            return h, h
        return h, image

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """F(x, t).

        Args:
            x: Scaled noisy images c_in y, (B, in_channels, H, W); sides divisible by 2^(levels - 1).
            t: c_noise, (B,).
            labels: long (B,), -1 for none; or float vectors (B, label_dim). Ignored without label_dim.
            augment: What augmentation did, (B, augment_dim). Ignored without augment_dim.

        Returns:
            (B, out_channels, H, W)
        """
        emb = self.embed(t, labels, augment)
        kept = self.encode(x, emb)
        h, out = kept[-1], None
        for level in reversed(range(len(self.resolutions))):
            h = self.decode_level(level, h, kept, emb)
            out = self.add_image(level, h, out)
        return out

    def add_image(self, level: int, h: Tensor, out: Tensor | None) -> Tensor | None:
        """The image so far, sum of what each level with a way out gives."""
        name = f"{self.resolutions[level]}x{self.resolutions[level]}"
        if f"{name}_aux_conv" not in self.dec:
            return out
        image = self.dec[f"{name}_aux_conv"](F.silu(self.dec[f"{name}_aux_norm"](h)))
        return image if out is None else image + self.dec[f"{name}_aux_up"](out)
