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
    def gives_variances(self) -> bool:
        """Whether the output has 2C channels, the second half of which are variances."""
        return False

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
    def gives_variances(self):
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


NETWORKS: dict[str, type[Network]] = {"unet": UNetModel, "adm": ADMModel}
