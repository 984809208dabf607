"""The sections of a configuration but ``model``: every key, its meaning, range and default."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from configs.base import AsTuple, Count, Fraction, Natural, NonNegative, Positive, Section, Side


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


class DiffusionSection(Section):
    schedule: Literal["discrete", "sigma", "flow"] = "discrete"
    """discrete: DDPM's steps; sigma: EDM's continuous noise levels; flow: rectified flow."""
    prediction: Literal["epsilon", "v_prediction", "sample", "flow"] = "epsilon"
    """What the network's output is: the noise, v, the image, or noise minus image."""
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
    rescale_timesteps: bool = False
    """The network is told t * 1000 / T, as improved-diffusion's option has it."""
    timestep_respacing: Count | Annotated[str, Field(pattern=r"^(ddim)?\d+$|^\d+(,\d+)+$")] | None = None
    """Train on fewer of the T steps: a number, 10,15,20 or ddimN, as guided-diffusion's option has it; none: on all."""
    sigma_min: Positive = 0.002
    """Lowest training level of the sigma schedule."""
    sigma_max: Positive = 80.0
    """Highest training level of the sigma schedule, where its chains start."""
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
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"diffusion.sigma_min {self.sigma_min} must be below diffusion.sigma_max {self.sigma_max}")
        if self.prediction == "epsilon" and (self.zero_terminal_snr or self.schedule == "flow"):
            cause = "schedule flow" if self.schedule == "flow" else "zero_terminal_snr"
            raise ValueError(f"diffusion.prediction epsilon gives no image from pure noise, where a chain of "
                             f"diffusion.{cause} starts; use v_prediction, sample or flow")
        if self.prediction == "epsilon" and self.betas and self.betas[-1] == 1:
            raise ValueError("diffusion.betas end in 1, pure noise, from which diffusion.prediction epsilon gives no "
                             "image; use v_prediction or sample")
        return self


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
    weight: Literal["none", "min_snr"] = "none"
    """Weight of a time: min_snr is min(SNR, 5) on the error of the image (2303.09556)."""
    reduce: Literal["sum", "mean"] = "sum"
    """Over pixels: sum as DDIM and SA-DPM, whose gradient clipping depends on it; mean as ADM and diffusers."""
    variational: Literal["none", "hybrid", "rescaled_hybrid", "kl", "rescaled_kl"] = "none"
    """Variational bound in bits per dimension (2102.09672): added to the loss, for learned variances (hybrid; rescaled:
    times S/1000 of a chain of S steps), or in place of it (kl; rescaled: times S)."""

    @model_validator(mode="after")
    def _sequence_has_steps(self):
        if self.lamda > 0 and self.num_consecutive_steps < 1:
            raise ValueError(
                f"num_consecutive_steps {self.num_consecutive_steps} with lamda {self.lamda} is not possible; "
                "use lamda 0 for the plain loss, or at least 1 consecutive step"
            )
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
    half_life: Positive | None = None
    """Images after which a weight counts half (EDM)."""
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
    max_steps: Count | None = None
    """Optimizer steps after which training ends, if that comes before n_epochs."""
    time_sampler: Literal["antithetic", "uniform", "lognormal", "logit_normal", "loss_second_moment"] = "antithetic"
    """How the times of a batch are drawn: antithetic pairs (DDIM), independently, with a normal logarithm of the level
    (EDM) or a normal logit of the rank (flow models), or where the latest losses are large (guided-diffusion)."""
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
    sample_num: Natural = 36
    """Images of the EMA sample grid drawn with each snapshot; 0: no grid."""
    sample_timesteps: Count = 50
    """DDIM steps for that grid."""
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
    seed: Natural = 1024
    """Seed of weights, data order and noise."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Autocast of the network; auto: on CUDA bf16 where the GPU has it, else fp16; on CPU off."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time, the same gradients."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the network; auto: on CUDA for runs of 2,000 steps or more."""


class Sampling(Section):
    batch_size: Count = 64
    """Images for each network call of generate.py."""
    ckpt_id: Natural | None = None
    """Epoch to sample from when --ckpt_id is not given; none: the newest."""
    fid_stats: str | None = None
    """Reference statistics, a path or a name in pytorch_fid/."""


class Optim(Section):
    optimizer: Literal["Adam", "AdamW", "RMSProp", "SGD"] = "Adam"
    """Update rule."""
    lr: Positive = 2e-4
    """Learning rate after warm-up."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """cosine, linear: from lr to 0 over the whole run."""
    warmup_steps: Natural = 0
    """Steps over which the learning rate rises linearly to lr."""
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
