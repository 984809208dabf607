"""The ``model`` sections of EDM's two networks; the keys are its constructor arguments."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.base import Count, Counts, Fraction, Natural
from configs.network import Network, check_channels, check_halvings


class EDMNetwork(Network):
    """What both have in common."""

    in_channels: Count = 3
    """Channels of x_t; equal to data.channels. Those of the output follow: twice as many for prediction iddpm."""
    label_dim: Natural = 0
    """Size of the label set, for class-conditional networks; 0: unconditional."""
    augment_dim: Natural = 0
    """Numbers that say how an image was augmented; 9 for data.augment, 0: the network is not told."""
    channel_mult_emb: Count = 4
    """Width of the embedding in units of model_channels."""

    @property
    def num_labels(self):
        return self.label_dim

    @property
    def width(self):
        return self.model_channels

    def check(self, data):
        check_channels(data, in_channels=self.in_channels)
        if self.model_channels % 4:
            raise ValueError(f"model.model_channels {self.model_channels} must be a multiple of 4, and of 32 where "
                             "widths reach 128 (group normalisation)")
        check_halvings(data, len(self.channel_mult), "model.channel_mult")


class SongUNetModel(EDMNetwork):
    """DDPM++ and NCSN++, as EDM has them."""

    arch: Literal["songunet"] = "songunet"
    """Which network: songunet (DDPM++ and NCSN++)."""
    model_channels: Count = 128
    """Base width."""
    channel_mult: Annotated[Counts, Field(min_length=1)] = (1, 2, 2, 2)
    """Width of each resolution in units of model_channels, highest resolution first."""
    num_blocks: Count = 4
    """Residual blocks for each resolution."""
    attn_resolutions: Counts = (16,)
    """Resolutions with self-attention; on non-square images the longer side decides."""
    dropout: Fraction = 0.10
    """Dropout probability inside the residual blocks."""
    embedding_type: Literal["positional", "fourier"] = "positional"
    """Of the noise level: positional for DDPM++, fourier for NCSN++."""
    channel_mult_noise: Count = 1
    """Width of the noise embedding in units of model_channels: 1 for DDPM++, 2 for NCSN++."""
    encoder_type: Literal["standard", "skip", "residual"] = "standard"
    """standard for DDPM++, residual for NCSN++: how the image enters at lower resolutions."""
    decoder_type: Literal["standard", "skip"] = "standard"
    """skip: every resolution adds to the output."""
    resample_filter: Annotated[Counts, Field(min_length=2)] = (1, 1)
    """Weights of the resampling filter: [1, 1] for DDPM++, [1, 3, 3, 1] for NCSN++."""

    @model_validator(mode="after")
    def _filter_is_even(self):
        if len(self.resample_filter) % 2:
            raise ValueError(f"model.resample_filter has {len(self.resample_filter)} weights; it must be an even "
                             "number, such as [1, 1] or [1, 3, 3, 1]")
        return self


class DhariwalUNetModel(EDMNetwork):
    """ADM's network as EDM has it; other names and weights than arch adm."""

    arch: Literal["dhariwal"] = "dhariwal"
    """Which network: dhariwal (ADM as EDM has it)."""
    model_channels: Count = 192
    """Base width."""
    channel_mult: Annotated[Counts, Field(min_length=1)] = (1, 2, 3, 4)
    """Width of each resolution in units of model_channels, highest resolution first."""
    num_blocks: Count = 3
    """Residual blocks for each resolution."""
    attn_resolutions: Counts = (32, 16, 8)
    """Resolutions with self-attention, in blocks of at least 64 channels."""
    dropout: Fraction = 0.10
    """Dropout probability inside the residual blocks."""
