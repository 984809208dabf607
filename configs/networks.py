"""The ``model`` section: one class for each ``arch``, with the keys of the program that the network comes from."""

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from configs.base import AsTuple, Count, Counts, Fraction, Natural, Positive, Section

MOST_BLOCKS, WIDEST = 1000, 65536                # of a network in any of its numbers; published ones have 6 and 1,536


class Network(Section, ABC):
    """What the rest of the program asks of a ``model`` section, whatever its arch."""

    NOT_THE_NETWORK: ClassVar[set[str]] = {"dropout"}
    """Keys that may change between training and use: the weights fit either way."""

    arch: str

    @model_validator(mode="after")
    def _is_no_larger_than_any(self):
        """A stranger's file must not make a network that fills the memory layer by layer."""
        for key, value in self:
            limit = MOST_BLOCKS if "block" in key else WIDEST
            if isinstance(value, tuple) and len(value) > MOST_BLOCKS:
                raise ValueError(f"model.{key} has {len(value)} entries, at most {MOST_BLOCKS} are possible")
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and number > limit:
                    raise ValueError(f"model.{key} {number} is beyond {limit}")
        return self

    @property
    @abstractmethod
    def num_labels(self) -> int:
        """Size of the label set; 0: not conditioned on labels."""

    @property
    def conditional(self) -> bool:
        """Whether it may be conditioned on anything, so that conditions can be dropped."""
        return self.num_labels > 0

    @property
    def learns_variance(self) -> bool:
        """Whether the output has a second half that says how large the variance of a step is."""
        return False

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels at the highest resolution, by which the memory format is chosen."""

    @abstractmethod
    def check(self, data) -> None:
        """ValueError where the network cannot work on images of the ``data`` section."""

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


# guided-diffusion's widths by image size; 32 is DDPM-IP's.
CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}


class ADMModel(Network):
    """guided-diffusion's network, which DDPM-IP and ADM-ES use, by its flags."""

    arch: Literal["adm"] = "adm"
    """Which network: adm."""
    in_channels: Count = 3
    """Channels of x_t; equal to data.channels."""
    num_channels: Count = 128
    """Base width M; every width must be a multiple of 32 (group normalisation)."""
    num_res_blocks: Count = 2
    """Residual blocks for each resolution on the way down; one more on the way up."""
    channel_mult: Annotated[tuple[Positive, ...], AsTuple, Field(min_length=1)] | None = None
    """Width of each resolution over M, highest first; 0.5 is possible. None: guided-diffusion's for 32 (DDPM-IP's) to
    512 pixels."""
    attention_resolutions: Counts = (16, 8)
    """Resolutions with self-attention, as image sizes; on non-square images the longer side decides."""
    num_heads: Count = 4
    """Heads of an attention, where num_head_channels is -1."""
    num_heads_upsample: Count | Literal[-1] = -1
    """Heads on the way up; -1: num_heads."""
    num_head_channels: Count | Literal[-1] = -1
    """Width of a head, from which their number follows; -1: num_heads decides."""
    use_scale_shift_norm: bool = True
    """The embedding scales and shifts a normalisation (FiLM); false: it is added."""
    resblock_updown: bool = False
    """Residual blocks change the resolution, instead of convolutions."""
    use_new_attention_order: bool = False
    """Queries, keys and values are split before heads; false: after. Weights fit both, and mean other things."""
    conv_resample: bool = True
    """Convolve when changing resolution, where residual blocks do not; false: average pooling and nearest neighbour."""
    learn_sigma: bool = False
    """Learn the variances of the chain: twice as many output channels, trained by loss.variational."""
    dropout: Fraction = 0.0
    """Dropout probability inside the residual blocks."""
    num_classes: Natural = 0
    """Size of the label set, for class-conditional networks; 0: unconditional."""

    @property
    def num_labels(self):
        return self.num_classes

    @property
    def learns_variance(self):
        return self.learn_sigma

    @property
    def width(self):
        return int(self.num_channels * (self.channel_mult or (1,))[0])

    def multipliers(self, data) -> tuple[float, ...]:
        """``channel_mult``, or guided-diffusion's for this size."""
        size = max(data.height, data.width)
        if self.channel_mult is None and size not in CHANNEL_MULT:
            raise ValueError(f"model.channel_mult has no default for data.image_size {size}, only for "
                             f"{', '.join(map(str, CHANNEL_MULT))}; give a list such as [1, 2, 2]")
        return self.channel_mult or CHANNEL_MULT[size]

    def check(self, data):
        if self.in_channels != data.channels:
            raise ValueError(f"model.in_channels {self.in_channels} must equal data.channels {data.channels}")
        mults = self.multipliers(data)
        widths = [int(mult * self.num_channels) for mult in mults]
        for mult, width in zip(mults, widths, strict=True):
            if width % 32 or not width:
                raise ValueError(f"model.num_channels {self.num_channels} * {mult:g} (model.channel_mult) must be a "
                                 "multiple of 32")
        factors = {max(data.height, data.width) // side for side in self.attention_resolutions}
        attended = {width for i, width in enumerate(widths) if 2**i in factors} | {widths[-1]}
        keys = ("num_head_channels",) if self.num_head_channels != -1 else ("num_heads", "num_heads_upsample")
        for key in keys:
            for width in sorted(attended):
                if getattr(self, key) != -1 and width % getattr(self, key):
                    raise ValueError(f"model.{key} {getattr(self, key)} does not divide the {width} channels of an "
                                     "attention")
        check_halvings(data, len(mults), "model.channel_mult")


class EDMNetwork(Network):
    """What EDM's two networks have in common; the keys are its constructor arguments."""

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
        if self.in_channels != data.channels:
            raise ValueError(f"model.in_channels {self.in_channels} must equal data.channels {data.channels}")
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


NETWORKS: dict[str, type[Network]] = {"unet": UNetModel, "adm": ADMModel, "songunet": SongUNetModel,
                                      "dhariwal": DhariwalUNetModel, "diffusers": DiffusersModel}
