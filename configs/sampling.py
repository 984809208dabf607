"""How images are sampled: one checked, hashable, printable object for scripts, Python, studies, manifests and logs."""

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from configs.base import AsTuple, Count, Positive, Section

# What each sampler reads beside what all read.
SAMPLE_TYPES = {"generalized": {"eta", "classifier_scale"}, "ddpm_noisy": {"var_type", "classifier_scale"},
                "heun": {"churn"}, "euler": {"churn"}, "dpmpp_2m": set()}
VAR_TYPES = ("fixedlarge", "fixedsmall", "learned")
SHORT = {"generalized": "DDIM", "ddpm_noisy": "ancestral", "heun": "Heun", "euler": "Euler", "dpmpp_2m": "DPM++ 2M"}


def _one_of(known, what: str):
    def check(value: str) -> str:
        if value not in known:
            raise ValueError(f"{what} {value!r} is unknown; known: {', '.join(sorted(known))}")
        return value
    return AfterValidator(check)


class SamplerSettings(Section):
    sample_type: Annotated[str, _one_of(SAMPLE_TYPES, "sample_type")] = "generalized"
    """generalized (DDIM), ddpm_noisy (ancestral), heun or euler (EDM), dpmpp_2m (DPM-Solver++)."""
    timesteps: Count | str = 100
    """Number of steps; or of a discrete chain a respacing, ddimN or 10,15,20."""
    skip_type: str | None = None
    """How the steps are spaced; none: uniform on discrete and flow schedules, edm on sigma schedules."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """0 (deterministic) to 1, for generalized."""
    var_type: Annotated[str, _one_of(VAR_TYPES, "var_type")] = "fixedlarge"
    """Variance of ddpm_noisy; learned needs a network that gives variances."""
    eps_scaler: Positive | Annotated[tuple[float, float], AsTuple] | None = None
    """Divide the predicted noise by B, or by K i + B."""
    churn: Annotated[tuple[Annotated[float, Field(ge=0, allow_inf_nan=True)], ...], AsTuple,
                     Field(min_length=1, max_length=4)] | None = None
    """EDM's S_churn, S_min, S_max, S_noise, or the leading ones of them, for heun and euler."""
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
        defaults = {"eta": 0.0, "var_type": "fixedlarge", "churn": None, "classifier_scale": None}
        for key in defaults.keys() - SAMPLE_TYPES[self.sample_type]:
            if getattr(self, key) != defaults[key]:
                readers = " and ".join(name for name, keys in SAMPLE_TYPES.items() if key in keys)
                raise ValueError(f"{key} is for {readers}, not for {self.sample_type}")
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
        parts = [SHORT[self.sample_type], f"eta {self.eta:g}" if self.eta else "",
                 self.var_type if self.sample_type == "ddpm_noisy" else "", self.skip_type or "",
                 f"churn {' '.join(f'{number:g}' for number in self.churn)}" if self.churn else "",
                 _scaling(self.eps_scaler), {None: "", True: "clipped", False: "not clipped"}[self.clip_denoised],
                 f"class {self.classes}" if self.classes else "",
                 f"guidance {self.guidance:g}" if self.guidance is not None else "",
                 "in ({:g}, {:g}]".format(*self.guidance_interval) if self.guidance_interval else "",
                 f"classifier {self.classifier_scale:g}" if self.classifier_scale else ""]
        return ", ".join(part for part in parts if part)

    def __str__(self) -> str:
        return f"{self.label}, {self.timesteps} steps"


def _scaling(eps_scaler) -> str:
    if eps_scaler is None:
        return ""
    return f"eps / {eps_scaler:g}" if isinstance(eps_scaler, float) else "eps / ({:g} i + {:g})".format(*eps_scaler)
