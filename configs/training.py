"""The sections loss, training and optim of a configuration: every key, its meaning, range and default."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from configs.base import AsTuple, Count, Fraction, InImages, Natural, NonNegative, Positive, Section

RAMP_UP = 0.05                              # EDM's


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
        """The same, with those of scheduled sampling, which lead to each of them and are forward only."""
        return self.terms * (1 + (self.scheduled_sampling.steps if self.scheduled_sampling else 0))

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
        if self.perturbation_target and self.input_perturbation == 0:
            raise ValueError(f"perturbation_target {self.perturbation_target} needs input_perturbation, such as 0.1")
        if self.scheduled_sampling and self.slow_flow:
            raise ValueError("scheduled_sampling and slow_flow both decide on the input of a time; use one of them")
        if self.slow_flow and self.variational != "none":
            raise ValueError(f"slow_flow shows inputs of other times, of which variational {self.variational} knows "
                             "nothing; use one of them")
        if self.variational != "none" and self.reduce != "mean":
            raise ValueError(f"variational {self.variational} is a mean over pixels; set loss.reduce to mean")
        if "kl" in self.variational and self.weight != "none":
            raise ValueError(f"variational {self.variational} takes the place of the loss that weight {self.weight} "
                             "weighs; set loss.weight to none, or use hybrid")
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
    ramp_up: NonNegative = RAMP_UP
    """With half_life: it is at most this share of the images seen so far; 0: no ramp-up."""
    length: Annotated[float, Field(gt=0, lt=0.289)] | None = None
    """Relative width of a power-function profile (EDM2), for averages that are chosen after training."""

    @model_validator(mode="after")
    def _is_one_kind(self):
        given = [key for key in ("rate", "half_life", "length") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"an average has exactly one of rate, half_life and length; given: {given or 'none'}")
        if self.warmup and self.rate is None:
            raise ValueError(f"an average's warmup is for rate, not for {given[0]}; leave it out")
        if self.ramp_up != RAMP_UP and self.half_life is None:
            raise ValueError(f"an average's ramp_up is for half_life, not for {given[0]}; leave it out")
        return self

    def __str__(self) -> str:
        kind = next(key for key in ("rate", "half_life", "length") if getattr(self, key) is not None)
        return f"{kind} {getattr(self, kind):g}"


def _as_averages(value):
    """0.9999, a list of such, or a list of mappings, as a tuple of Averages' keys; of false an empty one."""
    if value is False:
        return ()
    if isinstance(value, (int, float, dict)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        return value
    if any(isinstance(each, bool) for each in value):
        raise ValueError(f"true and false are no averages, given {value}; give rates such as 0.9999, or false alone "
                         "for none")
    return tuple({"rate": float(each)} if isinstance(each, (int, float)) else each for each in value)


class Training(Section):
    batch_size: Count = 128
    """Images for each process and optimizer step. As an override it takes the place of a file's global_batch_size."""
    global_batch_size: Count | None = None
    """Images for each optimizer step over all processes, in place of batch_size."""
    micro_batch_size: Count | None = None
    """Images for each network call on one process; the rest of its batch is accumulated. Fixing it makes a run the
    same for any number of processes."""
    n_epochs: Count = 1000
    """Epochs to train. As an override it takes the place of a file's total_images."""
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
    {length}. The first is sampled from; an empty list or false: none."""
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
    """Beside keep_last: keep those of every so many epochs in any case."""
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
    """torch.compile of the network; auto: on CUDA for runs of 2,000 network calls or more, where Triton has what it
    needs."""

    @property
    def limit(self) -> str:
        """The key that says how long the run is."""
        return "total_images" if self.total_images else "n_epochs"

    @model_validator(mode="after")
    def _retention_has_a_number(self):
        if self.keep_every and not self.keep_last:
            raise ValueError(f"keep_every {self.keep_every} says which snapshots stay beside the last ones; give "
                             "keep_last as well")
        return self

    @model_validator(mode="after")
    def _averages_have_names(self):
        """Full states know all but the first by its words, phema_{epoch}_{length}.pth three digits of a length."""
        others = [str(average) for average in self.ema[1:]]
        for names in (others, [f"length {average.length:.3f}" for average in self.ema if average.length]):
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"ema has two averages of {twice[0]}; leave one of them out")
        return self


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
