"""The sections of a configuration but ``model``: every key, its meaning, range and default."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from configs.base import AsTuple, Count, Fraction, InImages, Natural, NonNegative, Positive, Section, Side


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


PRECONDITIONED = ("edm", "vp", "ve", "iddpm")
NO_PURE_NOISE = ("epsilon", *PRECONDITIONED)                # from these no image follows where alpha is 0
CONSTANTS = {"sigma_data": ["edm"], "beta_d": ["vp"], "beta_min": ["vp"]}


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
        if self.timestep_respacing is not None and self.schedule != "discrete":
            raise ValueError(f"diffusion.timestep_respacing is for diffusion.schedule discrete, not {self.schedule}")
        low, high = self.sigma_min or 0.002, self.sigma_max or 80.0
        if low >= high:
            raise ValueError(f"diffusion.sigma_min {low} must be below diffusion.sigma_max {high}")
        if self.prediction in NO_PURE_NOISE and (self.zero_terminal_snr or self.schedule == "flow"):
            cause = "schedule flow" if self.schedule == "flow" else "zero_terminal_snr"
            raise ValueError(f"diffusion.prediction {self.prediction} gives no image from pure noise, where a chain of "
                             f"diffusion.{cause} starts; use v_prediction, sample or flow")
        if self.prediction in NO_PURE_NOISE and self.betas and self.betas[-1] == 1:
            raise ValueError(f"diffusion.betas end in 1, pure noise, from which diffusion.prediction {self.prediction} "
                             "gives no image; use v_prediction or sample")
        for key, readers in CONSTANTS.items():
            if getattr(self, key) is not None and self.prediction not in readers:
                raise ValueError(f"diffusion.{key} is for diffusion.prediction {' and '.join(readers)}, not for "
                                 f"{self.prediction}")
        if self.rescale_timesteps and self.prediction in PRECONDITIONED:
            raise ValueError(f"diffusion.rescale_timesteps is for networks that are told steps; with "
                             f"diffusion.prediction {self.prediction} they are told noise levels")
        return self


class ScheduledSampling(Section):
    """In place of noised images, what the network's own steps make of noisier ones (Deng et al., ICLR 2023)."""

    steps: Count = 1
    """m: network calls without gradient, from the m-th time above t down to t."""
    probability: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Of each image to take part, at the end of the ramp."""
    ramp: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the run over which the probability rises from 0; 0: it is the same from the beginning."""
    min_level: NonNegative = 0.05
    """Noise level sigma/alpha below which the plain input is used: the target grows without bound there."""


class Loss(Section):
    num_consecutive_steps: Natural = 2
    """K of the sequence-aware loss, the base step included; 0 or 1 with lamda 0 is the plain DDPM loss."""
    lamda: NonNegative = 1.0
    """Weight of the sequence term."""
    input_perturbation: NonNegative = 0.0
    """gamma of DDPM-IP: the network input is perturbed by gamma * N(0, I), the target is not."""
    perturbation_target: Literal["noise", "unperturbed"] | None = None
    """What the network means at a perturbed input, beyond epsilon: the noise n, or what it would mean without
    perturbation; none: noise for epsilon, unperturbed for v_prediction, sample and flow."""
    input_perturbation_probability: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the images that are perturbed; CIOP's is 0.8."""
    scheduled_sampling: ScheduledSampling | None = None
    """Train on the network's own steps: {steps: 1, probability: 0.8, ramp: 1, min_level: 0.05}; none: never."""
    slow_flow: Annotated[float, Field(ge=0, le=1)] = 0.0
    """gamma of MixFlow: inputs are of a noisier time than the network is told, in [(1 - gamma) tau, tau] with tau 0 at
    pure noise and 1 at the image; published with 0.8, for velocities, after training; 0: none."""
    weight: Literal["none", "min_snr"] = "none"
    """Weight of a time: min_snr is min(SNR, 5) on the error of the image (2303.09556)."""
    reduce: Literal["sum", "mean"] = "sum"
    """Over pixels: sum as DDIM and SA-DPM, whose gradient clipping depends on it; mean as ADM and diffusers."""
    variational: Literal["none", "hybrid", "rescaled_hybrid", "kl", "rescaled_kl"] = "none"
    """Variational bound in bits per dimension (2102.09672): added to the loss, for learned variances (hybrid; rescaled:
    times S/1000 of a chain of S steps), or in place of it (kl; rescaled: times S)."""

    @property
    def terms(self) -> int:
        """Network calls for each image and step, forward and back: the base step and those of the sequence."""
        return self.num_consecutive_steps if self.lamda > 0 else 1

    @property
    def calls(self) -> int:
        """The same, with those of scheduled sampling, which are forward only."""
        return self.terms + (self.scheduled_sampling.steps if self.scheduled_sampling else 0)

    @model_validator(mode="after")
    def _sequence_has_steps(self):
        if self.lamda > 0 and self.num_consecutive_steps < 1:
            raise ValueError(
                f"num_consecutive_steps {self.num_consecutive_steps} with lamda {self.lamda} is not possible; "
                "use lamda 0 for the plain loss, or at least 1 consecutive step"
            )
        if self.input_perturbation_probability < 1 and self.input_perturbation == 0:
            raise ValueError(f"input_perturbation_probability {self.input_perturbation_probability:g} needs "
                             "input_perturbation, such as 0.1")
        if self.scheduled_sampling and self.slow_flow:
            raise ValueError("scheduled_sampling and slow_flow both decide on the input of a time; use one of them")
        if self.slow_flow and self.variational != "none":
            raise ValueError(f"slow_flow shows inputs of other times, of which variational {self.variational} knows "
                             "nothing; use one of them")
        if self.variational != "none" and self.reduce != "mean":
            raise ValueError(f"variational {self.variational} is a mean over pixels; set loss.reduce to mean")
        if "kl" in self.variational and self.lamda > 0:
            raise ValueError(f"variational {self.variational} has no other terms, lamda {self.lamda} is given; set "
                             "loss.lamda to 0, or use hybrid")
        return self


class Average(Section):
    """One moving average of the weights: exactly one of rate, half_life and length."""

    rate: Fraction | None = None
    """Decay mu for each optimizer step."""
    warmup: bool = False
    """With rate: min(mu, (1 + n) / (10 + n)) at step n."""
    half_life: Annotated[Positive, InImages] | None = None
    """Images after which a weight counts half (EDM), such as 500k."""
    ramp_up: NonNegative = 0.05
    """With half_life: it is at most this share of the images seen so far; 0: no ramp-up."""
    length: Annotated[float, Field(gt=0, lt=0.289)] | None = None
    """Relative width of a power-function profile (EDM2), for averages that are chosen after training."""

    @model_validator(mode="after")
    def _is_one_kind(self):
        given = [key for key in ("rate", "half_life", "length") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"an average has exactly one of rate, half_life and length; given: {given or 'none'}")
        return self

    def __str__(self) -> str:
        kind = next(key for key in ("rate", "half_life", "length") if getattr(self, key) is not None)
        return f"{kind} {getattr(self, kind):g}"


def _as_averages(value):
    """0.9999, a list of such, or a list of mappings, as a tuple of Averages' keys."""
    if isinstance(value, (int, float, dict)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        return value
    return tuple({"rate": float(each)} if isinstance(each, (int, float)) else each for each in value)


class Training(Section):
    batch_size: Count = 128
    """Images for each process and optimizer step; not used when global_batch_size is set."""
    global_batch_size: Count | None = None
    """Images for each optimizer step over all processes."""
    micro_batch_size: Count | None = None
    """Images for each network call on one process; the rest of its batch is accumulated. Fixing it makes a run the
    same for any number of processes."""
    n_epochs: Count = 1000
    """Epochs to train."""
    total_images: Annotated[Count, InImages] | None = None
    """Images to train on, such as 200M, in place of n_epochs; k, M, G and Ki, Mi, Gi are understood."""
    max_steps: Count | None = None
    """Optimizer steps after which training ends, if that comes first."""
    time_sampler: Literal["antithetic", "uniform", "lognormal", "vp", "ve", "logit_normal", "beta",
                          "loss_second_moment"] = "antithetic"
    """How the times of a batch are drawn: antithetic pairs (DDIM), independently, with a normal logarithm of the level
    (EDM), as EDM's baselines vp and ve, with a normal logit of the rank (flow models), with 1 - rank from Beta(2, 1)
    (MixFlow), or where the latest losses are large (guided-diffusion)."""
    time_mean: float | None = None
    """Mean of that normal draw; none: -1.2 for lognormal, 0 for logit_normal."""
    time_std: Positive | None = None
    """Its standard deviation; none: 1.2 and 1."""
    ema: Annotated[tuple[Average, ...], BeforeValidator(_as_averages)] = (Average(rate=0.9999),)
    """Moving averages of the weights: a rate such as 0.9999, or a list of {rate, warmup}, {half_life, ramp_up} and
    {length}. The first is sampled from; an empty list: none."""
    label_dropout: Fraction = 0.0
    """Share of the labels that are hidden while training, for classifier-free guidance."""
    snapshot_freq: Count = 50
    """Save ckpt_{epoch}.pth and model_{epoch}_ema.pth every so many snapshot_units."""
    snapshot_unit: Literal["epochs", "steps"] = "epochs"
    """What snapshot_freq counts; DDIM's files count steps."""
    validation_freq: Natural = 0
    """Loss of the EMA weights on held-out images every so many optimizer steps; 0: never."""
    validation_num: Count = 1000
    """Held-out images for it, at most."""
    log_freq: Count = 50
    """Optimizer steps between two lines of metrics.jsonl."""
    loggers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], AsTuple] = ("tensorboard",)
    """Where curves and grids go beside metrics.jsonl and samples/; wandb has to be installed."""
    sample_num: Natural = 36
    """Images of each part of the sheet of samples drawn with each snapshot; 0: no sheet."""
    first_grid_minutes: NonNegative = 1.0
    """A run draws its first sheet after so many minutes, before the first snapshot; 0: not."""
    sample_timesteps: Count = 50
    """DDIM steps for that sheet."""
    checkpoint_minutes: NonNegative = 30.0
    """ckpt.pth is rewritten when it is older than this; 0: only with snapshots."""
    keep_last: Count | None = None
    """Keep ckpt_{epoch}.pth and model_{epoch}_ema.pth of so many snapshots; none: of all."""
    keep_every: Count | None = None
    """Keep those of every so many epochs in any case."""
    max_bad_steps: Count = 20
    """Steps without a finite gradient are skipped; so many in a row end the run."""
    fid_freq: Natural = 0
    """FID of the EMA weights every so many epochs, with a snapshot; 0: never."""
    fid_num: Count = 5000
    """Images for it, drawn with sample_timesteps DDIM steps."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1024
    """Seed of weights, data order and noise, below 2^32."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Autocast of the network; auto: on CUDA bf16 where the GPU has it, else fp16; on a CPU bf16 where it has
    avx512_bf16 or amx_bf16, else off. A resumed run keeps what it began with."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time, the same gradients."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the network; auto: on CUDA for runs of 2,000 steps or more."""

    @model_validator(mode="after")
    def _averages_have_names(self):
        """Full states know all but the first by its words, phema_{epoch}_{length}.pth three digits of a length."""
        others = [str(average) for average in self.ema[1:]]
        for names in (others, [f"length {average.length:.3f}" for average in self.ema if average.length]):
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"ema has two averages of {twice[0]}; leave one of them out")
        return self


class Sampling(Section):
    batch_size: Count = 64
    """Images for each network call of generate.py."""
    ckpt_id: Natural | None = None
    """Epoch to sample from when --ckpt_id is not given; none: the newest."""
    fid_stats: str | None = None
    """Reference statistics, a path or a name in pytorch_fid/."""


class Optim(Section):
    optimizer: Literal["Adam", "AdamW", "Adafactor", "RMSProp", "SGD"] = "Adam"
    """Update rule; Adafactor is that of transformers, without scaling by parameters or relative steps."""
    lr: Positive = 2e-4
    """Learning rate after warm-up."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """cosine, linear: from lr to 0 over the whole run."""
    warmup_steps: Natural = 0
    """Steps over which the learning rate rises linearly to lr, from lr / warmup_steps."""
    warmup_images: Annotated[Natural, InImages] = 0
    """The same in images, such as 10M, from 0 (EDM)."""
    weight_decay: NonNegative = 0.0
    """L2 penalty (Adam, RMSProp, SGD) or decoupled decay (AdamW)."""
    beta1: Fraction = 0.9
    """First moment of Adam; momentum of SGD."""
    beta2: Fraction = 0.999
    """Second moment of Adam."""
    amsgrad: bool = False
    """AMSGrad variant of Adam."""
    eps: Positive = 1e-8
    """Denominator offset of Adam and RMSProp."""
    grad_clip: Positive | None = None
    """Largest gradient norm; none: no clipping."""
    replace_non_finite: bool = False
    """Elements of gradients that are not a number become 0, infinite ones 1e5 with their sign (EDM), instead of the
    step being skipped; with amp fp16 a step is skipped all the same, and the loss scale lowered."""

    @model_validator(mode="after")
    def _one_warmup(self):
        if self.warmup_steps and self.warmup_images:
            raise ValueError("optim.warmup_steps and optim.warmup_images are both given; give one of them")
        return self
