"""How images are sampled: one checked, hashable, printable object for scripts, Python, studies, manifests and logs."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from configs.base import AsTuple, Count, NonNegative, Positive, Section

# What each sampler reads beside what all read.
SAMPLE_TYPES = {"generalized": {"eta", "var_type", "restart", "classifier_scale"},
                "ddpm_noisy": {"var_type", "classifier_scale"},
                "heun": {"churn", "restart", "ode_time", "ode_scale", "alpha"},
                "euler": {"churn", "restart", "ode_time", "ode_scale"}, "dpmpp_2m": set()}
FOREIGN = "diffusers:"                                     # before the name of a scheduler class of diffusers
VAR_TYPES = ("fixedlarge", "fixedsmall", "learned", "analytic")
SHORT = {"generalized": "DDIM", "ddpm_noisy": "ancestral", "heun": "Heun", "euler": "Euler", "dpmpp_2m": "DPM++ 2M"}


def read_by(sample_type: str) -> set[str]:
    """Which keys of SAMPLE_TYPES a sampler reads."""
    return {"eta"} if sample_type.startswith(FOREIGN) else SAMPLE_TYPES[sample_type]


def _sample_type(value: str) -> str:
    if not re.fullmatch(rf"{FOREIGN}[A-Za-z]\w*", value) and value not in SAMPLE_TYPES:
        raise ValueError(f"sample_type {value!r} is unknown; known: {', '.join(sorted(SAMPLE_TYPES))}, and "
                         f"{FOREIGN}NAME for a scheduler of diffusers such as {FOREIGN}UniPCMultistepScheduler")
    return value


def _one_of(known, what: str):
    def check(value: str) -> str:
        if value not in known:
            raise ValueError(f"{what} {value!r} is unknown; known: {', '.join(sorted(known))}")
        return value
    return AfterValidator(check)


def _parts(value):
    """``"0.05,pixel"`` as (0.05, "pixel"); a number alone as (number,); lists as tuples."""
    if isinstance(value, str):
        value = [_number(part) for part in value.split(",")]
    return (value,) if isinstance(value, (int, float)) else tuple(value) if isinstance(value, list) else value


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text.strip()


def _filled(needed: int, defaults: tuple, nothing):
    """A validator that completes a form of at least ``needed`` parts, and takes what changes nothing for none."""
    def fill(value):
        parts = _parts(value)
        if not isinstance(parts, tuple):
            return parts
        if all(isinstance(part, (int, float, str)) for part in parts) and nothing(parts):
            return None
        return parts + defaults[len(parts):] if len(parts) >= needed else parts
    return BeforeValidator(fill)


def _intervals(value):
    """``"3,2,0.14,0.3;..."``, one interval or a list of them, each with s_noise; those that repeat 0 times go."""
    if isinstance(value, str):
        value = value.split(";")
    elif isinstance(value, (list, tuple)) and value and isinstance(value[0], (int, float)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        return value
    each = [parts + (1.0,) if isinstance(parts, tuple) and len(parts) == 4 else parts for parts in map(_parts, value)]
    return tuple(parts for parts in each if not (isinstance(parts, tuple) and len(parts) == 5 and parts[1] == 0)) \
        or None


Dcw = Annotated[tuple[float, float | Literal["pixel"]] | None, _filled(1, (0.0, 0.0), lambda p: p in ((0,), (0, 0),
                                                                                                      (0, "pixel")))]
TimeShift = Annotated[tuple[NonNegative, NonNegative, Literal["paper", "code"], NonNegative] | None,
                      _filled(2, (0.0, 0.0, "paper", 0.0), lambda p: p[:1] == (0,))]
Interval = tuple[Annotated[int, Field(ge=2)], Count, Positive, Positive, Positive]
Restart = Annotated[tuple[Interval, ...] | None, BeforeValidator(_intervals)]


class SamplerSettings(Section):
    sample_type: Annotated[str, AfterValidator(_sample_type)] = "generalized"
    """generalized (DDIM), ddpm_noisy (ancestral), heun or euler (EDM), dpmpp_2m (DPM-Solver++); or
    diffusers:UniPCMultistepScheduler and such."""
    timesteps: Count | str = 100
    """Number of steps; or of a discrete chain a respacing, ddimN or 10,15,20."""
    skip_type: str | None = None
    """How the steps are spaced; none: uniform on discrete and flow schedules, edm on sigma schedules."""
    sigma_min: Positive | None = None
    """Lowest noise level of the spacings edm, vp, ve and iddpm; none: for edm the schedule's, else the spacing's
    own."""
    sigma_max: Positive | None = None
    """Highest noise level of these, where the chain starts; likewise."""
    rho: Positive | None = None
    """Of the spacing edm: even steps in sigma^(1/rho); none: the schedule's, else 7."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """0 (deterministic) to 1, for generalized."""
    var_type: Annotated[str, _one_of(VAR_TYPES, "var_type")] = "fixedlarge"
    """Variance of ddpm_noisy; learned needs a network that gives variances; analytic, also for generalized, gamma."""
    gamma: str | None = None
    """File of diagnose.py gamma, for var_type analytic."""
    eps_scaler: Positive | Annotated[tuple[float, float], AsTuple] | None = None
    """Divide the predicted noise by B, or by K i + B."""
    churn: Annotated[tuple[Annotated[float, Field(ge=0, allow_inf_nan=True)], ...], AsTuple,
                     Field(min_length=1, max_length=4)] | None = None
    """EDM's S_churn, S_min, S_max, S_noise, or the leading ones of them, for heun and euler."""
    dcw: Dcw = None
    """DCW's strength LOW for the low band and HIGH for the others, or LOW and pixel: without transform; 0: none."""
    time_shift: TimeShift = None
    """Time-shift sampler on discrete schedules: width of the window of times, CUTOFF up to which times are kept, paper
    or code, and the variance of the data, which is published as 0; width 0: none."""
    restart: Restart = None
    """Restart intervals N, K, MIN, MAX and S_noise (1): when the chain has reached level MIN, K times add noise up to
    MAX and return in N - 1 steps; for generalized, heun and euler."""
    ode_time: Literal["linear", "ve", "vp"] = "linear"
    """Time in which heun and euler make their steps (EDM's --schedule)."""
    ode_scale: Literal["none", "vp"] = "none"
    """Scale in which they make them (EDM's --scaling)."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of a step at which heun evaluates again: 1 is Heun's method, 0.5 the midpoint's."""
    clip_denoised: bool | None = None
    """Clamp estimates of the image to [-1, 1]; none: only for ddpm_noisy."""
    classes: str | None = None
    """Labels of a class-conditional network: random, none, one class, or a list such as 0-9 that is gone through by
    seed; none given: random."""
    guidance: float | None = None
    """Classifier-free guidance scale w: unconditional + w (conditional - unconditional); or autoguidance."""
    guidance_interval: Annotated[tuple[Annotated[float, Field(ge=0)], Positive], AsTuple] | None = None
    """Noise levels (low, high] inside which guidance acts."""
    classifier_scale: Positive | None = None
    """Scale of a noisy classifier's gradient, for generalized and ddpm_noisy (guided-diffusion)."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self):
        for key in sorted(set().union(*SAMPLE_TYPES.values()) - read_by(self.sample_type)):
            if getattr(self, key) != type(self).model_fields[key].default:
                readers = " and ".join(name for name, keys in SAMPLE_TYPES.items() if key in keys)
                raise ValueError(f"{key} is for {readers}, not for {self.sample_type}")
        if self.sample_type == "generalized" and self.var_type not in ("fixedlarge", "analytic"):
            raise ValueError(f"var_type {self.var_type} is for ddpm_noisy; the variance of generalized is eta, or "
                             "var_type analytic")
        if (self.var_type == "analytic") != (self.gamma is not None):
            raise ValueError("var_type analytic and gamma belong together; diagnose.py gamma writes the file")
        if self.gamma and self.guidance not in (None, 1):
            raise ValueError("var_type analytic is made of the unguided network's noise; leave out guidance")
        if self.time_shift and self.churn:
            raise ValueError("time_shift and churn both move the time of a step; use one of them")
        if self.time_shift and (self.ode_time, self.ode_scale, self.alpha) != ("linear", "none", 1.0):
            raise ValueError("time_shift gives each image a time of its own; ode_time, ode_scale and alpha have one "
                             "for all; use one of them")
        if self.guidance_interval and self.guidance is None:
            raise ValueError("guidance_interval needs guidance")
        if self.guidance_interval and self.guidance_interval[0] >= self.guidance_interval[1]:
            raise ValueError(f"guidance_interval {self.guidance_interval} is empty; give low, high with low < high")
        return self

    @property
    def clip(self) -> bool:
        return self.sample_type == "ddpm_noisy" if self.clip_denoised is None else self.clip_denoised

    def given(self) -> dict:
        """What differs from the defaults, as plain values."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @property
    def label(self) -> str:
        """The sampler in few words, without its number of steps."""
        name = SHORT.get(self.sample_type) or self.sample_type.replace(FOREIGN, "diffusers' ").removesuffix("Scheduler")
        parts = [name, f"eta {self.eta:g}" if self.eta else "",
                 self.var_type if self.sample_type == "ddpm_noisy" or self.gamma else "", self.skip_type or "",
                 *(f"{key} {getattr(self, key):g}" for key in ("sigma_min", "sigma_max", "rho") if getattr(self, key)),
                 f"in {self.ode_time} time" if self.ode_time != "linear" else "",
                 f"{self.ode_scale} scale" if self.ode_scale != "none" else "",
                 f"alpha {self.alpha:g}" if self.alpha != 1 else "",
                 f"churn {_words(self.churn)}" if self.churn else "",
                 f"DCW {_words(self.dcw)}" if self.dcw else "",
                 f"time shift {_words(self.time_shift)}" if self.time_shift else "",
                 f"restart {' + '.join(map(_words, self.restart))}" if self.restart else "",
                 _scaling(self.eps_scaler), {None: "", True: "clipped", False: "not clipped"}[self.clip_denoised],
                 f"class {self.classes}" if self.classes else "",
                 f"guidance {self.guidance:g}" if self.guidance is not None else "",
                 "in ({:g}, {:g}]".format(*self.guidance_interval) if self.guidance_interval else "",
                 f"classifier {self.classifier_scale:g}" if self.classifier_scale else ""]
        return ", ".join(part for part in parts if part)

    def __str__(self) -> str:
        return f"{self.label}, {self.timesteps} steps"


def _words(parts: tuple) -> str:
    return " ".join(part if isinstance(part, str) else f"{part:g}" for part in parts)


def _scaling(eps_scaler) -> str:
    if eps_scaler is None:
        return ""
    return f"eps / {eps_scaler:g}" if isinstance(eps_scaler, float) else "eps / ({:g} i + {:g})".format(*eps_scaler)
