"""The ``model`` section: one class for each ``arch``, with the keys of the program that the network comes from."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from configs.base import AsTuple, Count, Counts, Fraction, Natural, Positive
from configs.network import Network, check_channels, check_halvings
from configs.networks_edm import DhariwalUNetModel, SongUNetModel
from configs.pipelines import takes_text, unet_settings, vae_settings
from utils.hub import local_folder


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
        check_channels(data, in_channels=self.in_channels, out_ch=self.out_ch)
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
        """True also where it is not known, as the model is not on this machine yet."""
        folder = local_folder(self.pretrained, download=False)
        return folder is None or takes_text(unet_settings(folder))

    @property
    def prompted(self):
        """Raises UserError, DataError: no such folder, or no U-Net in it."""
        return takes_text(unet_settings(local_folder(self.pretrained)))

    @property
    def latent(self):
        """Raises UserError, DataError: as ``prompted``."""
        return vae_settings(local_folder(self.pretrained)) is not None

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
        check_channels(data, in_channels=self.in_channels)
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


NETWORKS: dict[str, type[Network]] = {"unet": UNetModel, "adm": ADMModel, "songunet": SongUNetModel,
                                      "dhariwal": DhariwalUNetModel, "diffusers": DiffusersModel}
