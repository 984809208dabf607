"""The sections data, diffusion and sampling of a configuration: every key, its meaning, range and default."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.base import AsTuple, Count, Fraction, Natural, Positive, Section, Side

NAMED_FILES = ("AFHQ", "FFHQ64", "FOLDER", "ZIP")           # data sets whose labels follow names of files and folders


class Data(Section):
    dataset: str
    """Name in the DATASETS registry: CIFAR10, DIGITS, ZIP, FOLDER, FFHQ64, AFHQ, ..."""
    image_size: Side | Annotated[tuple[Side, Side], AsTuple]
    """Side in pixels, or [height, width]."""
    channels: Literal[1, 3] = 3
    """1 (grey) or 3 (RGB)."""
    root: str | None = None
    """Folder or archive to read instead of exp/datasets/NAME (see docs/data.md)."""
    category: str | None = None
    """LSUN category, e.g. church_outdoor or bedroom."""
    random_flip: bool = True
    """Mirror each training image with probability 1/2."""
    augment: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability of each of EDM's geometric augmentations (2206.00364, appendix F.2), of which the network is told:
    0.12 or 0.15 there; 0: none. Mirroring belongs to them, so set random_flip to false."""
    rescaled: bool = True
    """Map [0, 1] to [-1, 1] by 2x - 1."""
    logit_transform: bool = False
    """Map [0, 1] to logits with lambda = 1e-6 instead of rescaling."""
    uniform_dequantization: bool = False
    """x * 255/256 + U/256 before rescaling, U uniform on [0, 1)."""
    gaussian_dequantization: bool = False
    """x + 0.01 N(0, 1) before rescaling."""
    num_workers: Natural = 4
    """Processes that decode images (packing, and training with data.cache off)."""
    validation_fraction: Fraction = 0.0
    """Part of a data set without an official split that is held out as split "test"."""
    cache: Literal["auto", "device", "ram", "mmap", "off"] = "auto"
    """Where decoded images lie while training: device memory, RAM, memory-mapped file, or nowhere."""
    labels: Literal["auto", "folders", "filenames", "none"] = "auto"
    """Where the classes of a folder or zip come from: dataset.json if there is one (auto), its top-level folders, or
    the text before the first "_" of a file name, alphabetically (guided-diffusion)."""
    max_size: Count | None = None
    """Use so many of the images, chosen by EDM's shuffle with seed 0; none: all."""
    random_crop: bool = False
    """Of latents: cut the window anywhere instead of from the middle."""
    variants: Count = 1
    """Of latents, which cannot be cropped and mirrored while training: so many crops of each image are packed, each
    with its mirror image where random_flip is set."""
    latent_dtype: Literal["float16", "bfloat16"] = "float16"
    """How latents and embeddings of prompts are stored."""
    skip_bad: Natural = 0
    """Number of unreadable images that are tolerated (and listed) before loading fails."""

    @property
    def height(self) -> int:
        return self.image_size if isinstance(self.image_size, int) else self.image_size[0]

    @property
    def width(self) -> int:
        return self.image_size if isinstance(self.image_size, int) else self.image_size[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.channels, self.height, self.width

    @model_validator(mode="after")
    def _one_range(self):
        if self.rescaled and self.logit_transform:
            raise ValueError("data.rescaled and data.logit_transform are both true; set one of them to false")
        return self

    @model_validator(mode="after")
    def _labels_come_from_files(self):
        if self.labels in ("folders", "filenames") and self.dataset not in NAMED_FILES:
            raise ValueError(f"data.labels {self.labels} is for data.dataset {' or '.join(NAMED_FILES)}, not for "
                             f"{self.dataset}; leave it at auto, or none")
        return self


PRECONDITIONED = ("edm", "vp", "ve", "iddpm")
NO_PURE_NOISE = ("epsilon", *PRECONDITIONED)                # from these no image follows where alpha is 0


class DiffusionSection(Section):
    schedule: Literal["discrete", "sigma", "flow"] = "discrete"
    """discrete: DDPM's steps; sigma: EDM's continuous noise levels; flow: rectified flow."""
    prediction: Literal["epsilon", "v_prediction", "sample", "flow", "edm", "vp", "ve", "iddpm"] = "epsilon"
    """What the network's output is: the noise, v, the image, or noise minus image; or EDM's preconditioning of it
    (2206.00364, table 1)."""
    beta_schedule: Literal["linear", "quad", "const", "jsd", "sigmoid", "cosine", "adm_linear", "scaled_linear"] = \
        "linear"
    """Of a discrete schedule: DDIM's five, Nichol & Dhariwal's cosine, guided-diffusion's linear (adm_linear, scaled
    to T) and diffusers' scaled_linear."""
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """First beta (linear, quad, sigmoid, scaled_linear)."""
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Last beta (linear, quad, const, sigmoid, scaled_linear)."""
    num_diffusion_timesteps: Count = 1000
    """T, the number of steps of a discrete schedule."""
    betas: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], AsTuple, Field(min_length=1)] | None = None
    """The betas themselves, in place of the keys above."""
    zero_terminal_snr: bool = False
    """Rescale the betas so that the last step is pure noise (2305.08891); not with epsilon."""
    set_alpha_to_one: bool = True
    """The chain ends at the clean image; false: at abar_0, as some of diffusers' scheduler files have it."""
    skip_type: Literal["uniform", "quad", "leading", "linspace", "trailing", "respace", "edm"] | None = None
    """How the steps of a chain are spaced unless --skip_type says otherwise; none: uniform, edm on sigma schedules."""
    steps_offset: Natural = 0
    """Added to every step of the spacing leading, as diffusers' scheduler files may ask (1 for Stable Diffusion)."""
    rescale_timesteps: bool = False
    """The network is told t * 1000 / T, as improved-diffusion's option has it."""
    timestep_respacing: Count | Annotated[str, Field(pattern=r"^(ddim)?\d+$|^\d+(,\d+)+$")] | None = None
    """Train on fewer of the T steps: a number, 10,15,20 or ddimN, as guided-diffusion's option has it; none: on all."""
    sigma_data: Positive | None = None
    """Standard deviation of the data in edm's preconditioning; none: 0.5."""
    beta_d: Positive | None = None
    """Slope of vp's betas; none: 19.9."""
    beta_min: Positive | None = None
    """First of vp's betas; none: 0.1."""
    sigma_min: Positive | None = None
    """Lowest level of the sigma schedule; none: 0.002, or what the prediction knows if that is more."""
    sigma_max: Positive | None = None
    """Highest level of the sigma schedule, where its chains start; none: 80."""
    rho: Positive = 7.0
    """The levels of the sigma schedule are even in sigma^(1/rho)."""
    rungs: Annotated[int, Field(ge=2)] = 1000
    """Training times that count as consecutive on the sigma and the flow schedule: so many in all."""
    shift: Positive = 1.0
    """Of the flow schedule: t -> shift t / (1 + (shift - 1) t) in training draws and step lists."""

    @property
    def num_steps(self) -> int:
        """T of a discrete schedule, rungs of a continuous one."""
        if self.schedule != "discrete":
            return self.rungs
        return len(self.betas) if self.betas else self.num_diffusion_timesteps

    @property
    def chain_length(self) -> int:
        """``num_steps``, or what timestep_respacing leaves of them."""
        if self.timestep_respacing is None:
            return self.num_steps
        return sum(map(int, str(self.timestep_respacing).removeprefix("ddim").split(",")))

    @model_validator(mode="after")
    def _makes_sense(self):
        low, high = self.sigma_min or 0.002, self.sigma_max or 80.0
        if low >= high:
            raise ValueError(f"diffusion.sigma_min {low} must be below diffusion.sigma_max {high}")
        if self.beta_schedule == "adm_linear" and self.num_diffusion_timesteps <= 20 and not self.betas:
            raise ValueError(f"diffusion.num_diffusion_timesteps {self.num_diffusion_timesteps}: the last beta of "
                             "adm_linear is 20 / T, which must stay below 1; give at least 21")
        if self.prediction in NO_PURE_NOISE and (self.zero_terminal_snr or self.schedule == "flow"):
            cause = "schedule flow" if self.schedule == "flow" else "zero_terminal_snr"
            raise ValueError(f"diffusion.prediction {self.prediction} gives no image from pure noise, where a chain of "
                             f"diffusion.{cause} starts; use v_prediction, sample or flow")
        if self.prediction in NO_PURE_NOISE and self.betas and self.betas[-1] == 1:
            raise ValueError(f"diffusion.betas end in 1, pure noise, from which diffusion.prediction {self.prediction} "
                             "gives no image; use v_prediction or sample")
        if self.rescale_timesteps and self.prediction in PRECONDITIONED:
            raise ValueError(f"diffusion.rescale_timesteps is for networks that are told steps; with "
                             f"diffusion.prediction {self.prediction} they are told noise levels")
        return self


class Sampling(Section):
    batch_size: Count = 64
    """Images for each network call of generate.py."""
    ckpt_id: Natural | None = None
    """Epoch to sample from when --ckpt_id is not given; none: the newest."""
    fid_stats: str | None = None
    """Reference statistics, a path or a name in pytorch_fid/."""
