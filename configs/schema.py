"""The typed configuration: every key, its meaning, range and default. ``python -m configs.schema`` prints the table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticUndefined

from configs.messages import describe
from configs.reading import convert_ddim_form, find_config, parse_yaml, read_config_file
from utils.atomic import write_text
from utils.errors import ConfigError

AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Counts = Annotated[tuple[Count, ...], AsTuple]
Side = Annotated[int, Field(ge=1, le=4096)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False,
                              use_attribute_docstrings=True)


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


class Model(Section):
    arch: str = "unet"
    """Name in the MODELS registry."""
    in_channels: Count = 3
    """Channels of x_t; equal to data.channels."""
    out_ch: Count = 3
    """Channels of the predicted noise; equal to data.channels."""
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
    var_type: Literal["fixedlarge", "fixedsmall"] = "fixedlarge"
    """Recorded for the seeds' files; sampling uses --var_type, and says so when the two differ."""
    ema: bool = True
    """Keep an exponential moving average of the weights."""
    ema_rate: Fraction = 0.9999
    """Decay mu of the average for each optimizer step."""
    ema_warmup: bool = False
    """Use min(mu, (1 + n) / (10 + n)) at step n instead of mu."""


class DiffusionSection(Section):
    beta_schedule: Literal["linear", "quad", "const", "jsd", "sigmoid", "cosine"] = "linear"
    """Noise schedule (DDIM's five, and Nichol & Dhariwal's cosine)."""
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """First beta (linear, quad, sigmoid)."""
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Last beta (linear, quad, const, sigmoid)."""
    num_diffusion_timesteps: Count = 1000
    """T, the number of steps of the forward process."""


class Loss(Section):
    num_consecutive_steps: Natural = 2
    """K of the sequence-aware loss, the base step included; 0 or 1 with lamda 0 is the plain DDPM loss."""
    lamda: NonNegative = 1.0
    """Weight of the sequence term."""
    input_perturbation: NonNegative = 0.0
    """gamma of DDPM-IP: the network input is perturbed by gamma * N(0, I), the target is not."""

    @model_validator(mode="after")
    def _sequence_has_steps(self):
        if self.lamda > 0 and self.num_consecutive_steps < 1:
            raise ValueError(
                f"num_consecutive_steps {self.num_consecutive_steps} with lamda {self.lamda} is not possible; "
                "use lamda 0 for the plain loss, or at least 1 consecutive step"
            )
        return self


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
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """cosine: from lr to 0 over the whole run."""
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


class Config(Section):
    """All settings of a run. ``Config(data={...}, model={...})`` is valid: all else has defaults.

    Raises:
        pydantic.ValidationError: Unknown key, wrong type, value out of range or in conflict with another.
    """

    data: Data
    model: Model
    diffusion: DiffusionSection = DiffusionSection()
    loss: Loss = Loss()
    training: Training = Training()
    sampling: Sampling = Sampling()
    optim: Optim = Optim()

    @model_validator(mode="after")
    def _sections_agree(self):
        data, model = self.data, self.model
        for key, given in (("model.in_channels", model.in_channels), ("model.out_ch", model.out_ch)):
            if given != data.channels:
                raise ValueError(f"{key} {given} must equal data.channels {data.channels}")
        for mult in model.ch_mult:
            if model.ch * mult % 32:
                raise ValueError(f"model.ch {model.ch} * {mult} (model.ch_mult) must be a multiple of 32")
        factor = 2 ** (len(model.ch_mult) - 1)
        for side in (data.height, data.width):
            if side % factor:
                below = side // factor * factor
                nearest = f"{below} and {below + factor}" if below else f"{factor}"
                raise ValueError(
                    f"data.image_size {side} cannot be halved {len(model.ch_mult) - 1} times for model.ch_mult; "
                    f"nearest valid: {nearest}"
                )
        if self.loss.num_consecutive_steps > self.diffusion.num_diffusion_timesteps:
            raise ValueError(
                f"loss.num_consecutive_steps {self.loss.num_consecutive_steps} exceeds "
                f"diffusion.num_diffusion_timesteps {self.diffusion.num_diffusion_timesteps}"
            )
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file in this project's, SA-DPM's or DDIM's form.

    Args:
        path: A file, or a name looked up in configs/.
        overrides: ``"training.batch_size=64"``, values parsed as YAML; they win over the file.

    Raises:
        ConfigError: With the file, the dotted key, what was given and what is allowed.
    """
    path = find_config(path)
    raw = read_config_file(path)
    for override in overrides:
        key, given, text = override.partition("=")
        section, dot, name = key.partition(".")
        if not (section and dot and name and given):
            raise ConfigError(f"override {override!r} is not of the form section.key=value")
        target = raw.setdefault(section, {})
        target[name] = parse_yaml(text, f"--{key} {text}")
    return validate(convert_ddim_form(raw, path), str(path))


def validate(raw: dict, where: str) -> Config:
    """Check nested dictionaries; raises ConfigError naming ``where``."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        by_key = {}                                                 # a union reports each of its members: keep one
        for problem in error.errors(include_url=False):
            by_key.setdefault(problem["loc"][:2], problem)
        # Unknown keys first: a misspelt one is often why another is missing.
        known = [*dotted_keys(), *Config.model_fields]
        problems = [describe(p, known) for p in sorted(by_key.values(), key=lambda p: p["type"] != "extra_forbidden")]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{where}: {problems[0]}{more}") from None


def save_config(config: Config, path: str | Path) -> None:
    """Write YAML that ``load_config`` reads back to an equal object."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def dotted_keys() -> dict[str, tuple]:
    """``{"data.dataset": (annotation, default, help), ...}`` of every key."""
    return {f"{name}.{key}": (field.annotation, field.get_default(), field.description)
            for name, section in Config.model_fields.items()
            for key, field in section.annotation.model_fields.items()}


def documentation() -> str:
    """docs/configuration.md."""
    lines = ["# Configuration", "", "Made by `python -m configs.schema`. Any key can be overridden on the command "
             "line: `--training.batch_size 64`.", "", "| key | default | meaning |", "|---|---|---|"]
    for dotted, (_, default, description) in dotted_keys().items():
        shown = "required" if default is PydanticUndefined else json.dumps(default)
        lines.append(f"| `{dotted}` | {shown} | {' '.join(description.split())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(documentation())
