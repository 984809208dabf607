"""The ``model`` section: one class for each ``arch``, with the keys of the program that the network comes from."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from configs.base import AsTuple, Count, Counts, Fraction, Natural, Positive, Section


class Network(Section):
    """What the rest of the program asks of a ``model`` section, whatever its arch."""

    NOT_THE_NETWORK: ClassVar[set[str]] = {"dropout"}
    """Keys that may change between training and use: the weights fit either way."""

    arch: str

    @property
    def num_labels(self) -> int:
        """Size of the label set; 0: not conditioned on labels."""
        raise NotImplementedError

    @property
    def conditional(self) -> bool:
        """Whether it may be conditioned on anything, so that conditions can be dropped."""
        return self.num_labels > 0

    @property
    def width(self) -> int:
        """Channels at the highest resolution, by which the memory format is chosen."""
        raise NotImplementedError

    def check(self, data) -> None:
        """ValueError where the network cannot work on images of the ``data`` section."""
        raise NotImplementedError

    def essence(self) -> dict:
        """The keys that decide which weights fit and what they compute."""
        return {key: value for key, value in self if key not in self.NOT_THE_NETWORK}


def check_halvings(data, levels: int, key: str) -> None:
    """ValueError unless both sides of the images can be halved ``levels`` - 1 times."""
    factor = 2 ** (levels - 1)
    for side in (data.height, data.width):
        if side % factor:
            below = side // factor * factor
            nearest = f"{below} and {below + factor}" if below else f"{factor}"
            raise ValueError(f"data.image_size {side} cannot be halved {levels - 1} times for {key}; nearest valid: "
                             f"{nearest}")


class UNetModel(Network):
    """DDPM's network, as DDIM and SA-DPM have it."""

    NOT_THE_NETWORK: ClassVar[set[str]] = {"dropout", "var_type"}

    arch: Literal["unet"] = "unet"
    """Which network: unet."""
    in_channels: Count = 3
    """Channels of x_t; equal to data.channels."""
    out_ch: Count = 3
    """Channels of the output; equal to data.channels."""
    ch: Count = 128
    """Base width; ch * m must be a multiple of 32 for every m in ch_mult (group normalisation)."""
    ch_mult: Annotated[Counts, Field(min_length=1)] = (1, 2, 2, 2)
    """Width multiplier of each resolution, highest first."""
    num_res_blocks: Count = 2
    """Residual blocks for each resolution."""
    attn_resolutions: Counts = (16,)
    """Resolutions with self-attention; on non-square images the longer side decides."""
    dropout: Fraction = 0.1
    """Dropout probability inside the residual blocks."""
    resamp_with_conv: bool = True
    """Convolve when changing resolution; false: average pooling and nearest neighbour only."""
    num_classes: Natural = 0
    """Size of the label set, for class-conditional networks; 0: unconditional."""
    var_type: Literal["fixedlarge", "fixedsmall"] = "fixedlarge"
    """Recorded for the seeds' files; sampling uses --var_type, and says so when the two differ."""

    @property
    def num_labels(self):
        return self.num_classes

    @property
    def width(self):
        return self.ch

    def check(self, data):
        for key, given in (("model.in_channels", self.in_channels), ("model.out_ch", self.out_ch)):
            if given != data.channels:
                raise ValueError(f"{key} {given} must equal data.channels {data.channels}")
        for mult in self.ch_mult:
            if self.ch * mult % 32:
                raise ValueError(f"model.ch {self.ch} * {mult} (model.ch_mult) must be a multiple of 32")
        check_halvings(data, len(self.ch_mult), "model.ch_mult")


class DiffusersModel(Network):
    """The U-Net of a pipeline folder, with its autoencoder and text encoders: Stable Diffusion 1, 2, XL, DDPM."""

    arch: Literal["diffusers"] = "diffusers"
    """A U-Net of diffusers: its keys are in the pipeline's own files."""
    pretrained: str
    """Folder of a diffusers pipeline, or the name of a model on the Hugging Face hub."""
    lora_rank: Count | None = None
    """Train low-rank adapters of this rank beside the frozen weights; none: all weights."""
    lora_alpha: Positive | None = None
    """Their output counts lora_alpha / lora_rank; none: equal to the rank."""
    lora_targets: Annotated[tuple[str, ...], AsTuple, Field(min_length=1)] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of the layers that get adapters."""

    @property
    def num_labels(self):
        return 0

    @property
    def conditional(self):
        return True

    @property
    def width(self):
        return 320

    def check(self, data):
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ValueError(f"model.lora_alpha {self.lora_alpha} needs model.lora_rank")
        if data.logit_transform:
            raise ValueError("data.logit_transform is for the unet of this program, not for model.arch diffusers")


NETWORKS: dict[str, type[Network]] = {"unet": UNetModel, "diffusers": DiffusersModel}
