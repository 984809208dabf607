"""From seeds to images: the one path that generate.py, Python, diagnosis, studies and the FID while training take."""

from collections.abc import Callable, Sequence
from math import inf

import torch
from torch import Tensor

from configs.sampling import FOREIGN, SamplerSettings, read_by
from functions.chain import scales_of
from functions.denoiser import Denoiser
from functions.denoising import SAMPLERS, network_calls
from functions.flow_forms import FlowForm
from functions.guidance import classifier_gradient
from functions.levels import LEVELS, RANGES
from functions.ode import check_churn
from functions.prediction import make_prediction
from functions.remedies import REMEDIES, Remedy
from functions.rng import SeededNoise, derive_seed, parse_seeds
from functions.schedule import make_schedule
from functions.timesteps import chain_range, sampling_times
from runners.conditioning import without
from runners.sampling.gamma import GammaFile
from runners.sampling.schedulers import SchedulerChain
from utils.errors import DivergedError, UserError

LABELS = 1                                                 # stream of an image's own label, beside its noise
OPTIONS = {"generalized": ["eta"], "ddpm_noisy": ["var_type"], "heun": ["churn"], "euler": ["churn"], "dpmpp_2m": []}


def check_settings(settings: SamplerSettings, config, codec, *, has_guide: bool = False, num_classes: int = 0,
                   prompted: bool | None = None) -> list:
    """The times of a chain with these settings, ascending; refuses all that a sampler would refuse on its first step.

    Args:
        config: Of the network.
        codec: Its own.
        has_guide: Whether there is a worse network to guide by.
        num_classes: Classes of a classifier to guide by; 0: there is none.
        prompted: Whether the network is told prompts; None: if it is of a kind that may be.

    Raises:
        UserError: A setting that is not possible with this network.
    """
    schedule, prediction, model = make_schedule(config.diffusion), make_prediction(config.diffusion), config.model
    try:
        times = times_of(settings, schedule, prediction)
        schedule.check_times(times)
        scales_of(settings.eps_scaler, len(times))
        check_churn(settings.churn)
        form_of(settings, schedule, prediction, times)
        for remedy in remedies_of(settings):
            remedy.on(schedule, times, prediction.round)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    if settings.clip_denoised and not codec.bounded:
        raise UserError("--clip_denoised: what is diffused here does not lie in [-1, 1] (logits or latents), so that "
                        "there is nothing to clip to; leave it out")
    if settings.dcw and settings.dcw[1] != "pixel" and any(side % 2 for side in codec.shape[1:]):
        raise UserError(f"--dcw: a Haar transform halves the sides of {codec.shape[1]} x {codec.shape[2]}, which are "
                        "not even; use LOW,pixel")
    if settings.var_type == "learned" and not model.learns_variance:
        raise UserError("--var_type learned: this network has learned no variances; use fixedlarge or fixedsmall")
    num_labels = model.num_labels
    if settings.classes and not (num_labels or num_classes):
        raise UserError(f"--classes {settings.classes}: this network takes no labels")
    classes_of(settings.classes, num_labels or num_classes)
    if prompted is None:
        prompted = model.conditional and not num_labels
    if settings.guidance is not None and not (num_labels or has_guide or prompted):
        raise UserError(f"--guidance {settings.guidance:g} needs a network with classes or prompts, or a worse one to "
                        "guide by (--guide_weights)")
    if has_guide and settings.guidance is None:
        raise UserError("--guide_weights needs --guidance, such as 2")
    if bool(num_classes) != bool(settings.classifier_scale):
        raise UserError("--classifier needs --classifier_scale, such as 1" if num_classes else
                        f"--classifier_scale {settings.classifier_scale:g} needs --classifier, a file of weights")
    if num_classes and num_labels not in (0, num_classes):
        raise UserError(f"--classifier tells {num_classes} classes apart, the network has {num_labels}")
    return times


def times_of(settings: SamplerSettings, schedule, prediction) -> list:
    """The times of a chain, ascending. ValueError, UserError: settings that it cannot have."""
    ranged = [key for key in ("sigma_min", "sigma_max", "rho") if getattr(settings, key) is not None]
    fixed = not str(settings.timesteps).isdigit()
    if fixed and (ranged or settings.skip_type not in (None, "respace")):
        raise UserError(f"--timesteps {settings.timesteps} names the steps themselves; it goes with no "
                        f"--{ranged[0] if ranged else f'skip_type {settings.skip_type}'}")
    if settings.sample_type.startswith(FOREIGN):
        if settings.gamma or remedies_of(settings):
            raise UserError("--dcw, --time_shift, --restart and --gamma correct the steps of this program's samplers, "
                            f"not those of --sample_type {settings.sample_type}")
        if ranged:
            raise UserError(f"--{ranged[0]} is of this program's lists of levels, not of --sample_type "
                            f"{settings.sample_type}")
        return SchedulerChain(settings, schedule, prediction).times
    return sampling_times(schedule, settings.timesteps, settings.skip_type, prediction=prediction,
                          sigma_min=settings.sigma_min, sigma_max=settings.sigma_max, rho=settings.rho)


def form_of(settings: SamplerSettings, schedule, prediction, times: list) -> FlowForm | None:
    """The form of the flow in which heun and euler make their steps. ValueError: one that the levels cannot have."""
    spacing = settings.skip_type or schedule.skip_type
    if spacing in LEVELS:
        levels = chain_range(schedule, spacing, prediction, settings.sigma_min, settings.sigma_max)
    else:
        known = [level for level in map(schedule.level, times) if level < inf]       # noise alone is a step of its own,
        levels = (known[0], known[-1]) if known else RANGES["vp"]                    # which needs no form
    return FlowForm.of(settings.ode_time, settings.ode_scale, settings.alpha, levels)


def remedies_of(settings: SamplerSettings) -> list[Remedy]:
    """What the chain is corrected by, in the order in which it acts."""
    makers = {
        "dcw": lambda low, high: REMEDIES["dcw"](low, pixel=True) if high == "pixel" else REMEDIES["dcw"](low, high),
        "time_shift": REMEDIES["time_shift"],
        "restart": lambda *intervals: REMEDIES["restart"](intervals, corrector=settings.sample_type == "heun"),
    }
    return [makers[name](*getattr(settings, name)) for name in REMEDIES if getattr(settings, name)]


def calls_of(settings: SamplerSettings, schedule, prediction, times: list) -> int:
    """Network calls for each image."""
    guided = settings.guidance not in (None, 1)
    if settings.sample_type.startswith(FOREIGN):
        return SchedulerChain(settings, schedule, prediction).calls() * (1 + guided)
    extra = sum(remedy.on(schedule, times, prediction.round).calls for remedy in remedies_of(settings))
    return (network_calls(settings.sample_type, len(times), schedule.alpha(times[-1]) == 0) + extra) * (1 + guided)


def classes_of(text: str | None, num_labels: int) -> list[int] | None:
    """The classes that are gone through by seed; None: random. -1 is no label.

    Raises:
        UserError: No list of classes, or one that the network does not have.
    """
    if text in (None, "random"):
        return None
    if text == "none":
        return [-1]
    try:
        classes = parse_seeds(text)
    except ValueError as error:
        raise UserError(f"--classes {text!r} is neither random, none, nor a list such as 3 or 0-9 ({error})") from None
    if len(classes) > num_labels or max(classes) >= num_labels:
        raise UserError(f"--classes {text}: this network has classes 0 to {num_labels - 1}")
    return list(classes)


def check_gamma(file: GammaFile, times: list):
    """Its Gamma. UserError: it was not measured at these times."""
    try:
        file.gamma.check(times)
    except ValueError as error:
        raise UserError(f"--gamma: {error}") from None
    return file.gamma


class Sampler:
    """A network with settings applied to it.

    Args:
        denoiser: Of the network.
        codec: Between pixels and what is diffused.
        settings: SamplerSettings.
        config: Of the network.
        device: Where it computes.
        guide: Denoiser of a worse network, for autoguidance; None: guidance is classifier-free.
        guide_labels: Whether the guide takes labels.
        classifier: ``runners.sampling.classifier.Classifier`` to guide by, or None.
        gamma: GammaFile of ``settings.gamma``.
        prompts: Of a text-to-image network: the condition of each seed, and that of no prompt.

    Raises:
        UserError: Settings that are not possible with this network.
    """

    def __init__(self, denoiser: Denoiser, codec, settings: SamplerSettings, config, device,
                 guide: Denoiser | None = None, guide_labels: bool = False, *, classifier=None,
                 gamma: GammaFile | None = None, prompts=None):
        self.denoiser, self.codec, self.settings, self.device = denoiser, codec, settings, device
        self.num_labels, self.guide, self.guide_labels = config.model.num_labels, guide, guide_labels
        self.classifier, self.num_classes = classifier, classifier.num_classes if classifier else self.num_labels
        self.prompts = prompts
        self.times = check_settings(settings, config, codec, has_guide=guide is not None,
                                    num_classes=self.num_classes if classifier else 0)
        self.classes = classes_of(settings.classes, self.num_classes)
        self.remedies = remedies_of(settings)
        self.scheduler = None
        if settings.sample_type.startswith(FOREIGN):
            self.scheduler = SchedulerChain(settings, denoiser.schedule, denoiser.prediction)
        self._options = {key: getattr(settings, key) for key in OPTIONS.get(settings.sample_type, ["eta"])}
        if "ode_time" in read_by(settings.sample_type):
            self._options["form"] = form_of(settings, denoiser.schedule, denoiser.prediction, self.times)
        if gamma:
            self._options["gamma"] = check_gamma(gamma, self.times)

    @property
    def calls(self) -> int:
        """Network calls for each image."""
        return calls_of(self.settings, self.denoiser.schedule, self.denoiser.prediction, self.times)

    def labels(self, seeds: Sequence[int]) -> Tensor | None:
        """The label of each image, which its seed decides, long (B,); None where there are none to be told."""
        if not self.num_classes:
            return None
        if self.classes is None:
            labels = [derive_seed(seed, LABELS) % self.num_classes for seed in seeds]
        else:
            labels = [self.classes[seed % len(self.classes)] for seed in seeds]
        return torch.tensor(labels, device=self.device)

    def condition(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """What each image is conditioned on, which its seed decides; {} for unconditional networks."""
        if self.prompts is not None:
            return self.prompts.of_seeds(seeds)
        labels = self.labels(seeds)
        return {} if labels is None else {"labels": labels}

    def __call__(self, seeds: Sequence[int], callback: Callable | None = None) -> Tensor:
        """One image for each seed, in [0, 1], (B, C, H, W).

        Raises:
            DivergedError: An image is not finite; names the seeds.
        """
        noise = SeededNoise(seeds, self.device)
        x = noise.randn((len(seeds), *self.codec.shape))
        return self.run(x, noise, self.condition(seeds), callback)

    def run(self, x: Tensor, noise: SeededNoise, condition: dict[str, Tensor] | None = None,
            callback: Callable | None = None, start=None, watch: Callable | None = None) -> Tensor:
        """The chain from ``x``, to images in [0, 1], (B, C, H, W).

        Args:
            x: A standard normal draw; with ``start`` a draw of q(x_start | x_0), (B, C, H, W).
            noise: Where the chain's later draws come from.
            condition: From ``condition``, or that of other images.
            callback: See ``functions.chain.Chain``.
            start: A time of the list at which the chain is entered, instead of the noisiest.
            watch: See ``Denoiser.watched``: sees the further evaluations of a step as well.
        """
        x = x.to(self.denoiser.schedule.state_dtype)
        if start is None:
            x = x * self.denoiser.schedule.prior_std(self.times[-1])
        condition = condition or {}
        denoiser = self.conditioned(condition)
        if watch is not None:
            denoiser = denoiser.watched(watch)
        x = self.chain(denoiser, x, noise, callback=callback, start=start, **self._gradient(condition.get("labels")))
        bad = ~torch.isfinite(x).flatten(1).all(1)
        if bad.any():
            seeds = [seed for seed, is_bad in zip(noise.seeds, bad.tolist(), strict=True) if is_bad]
            raise DivergedError(f"the chain gave numbers that are not finite for {len(seeds)} image(s), seeds "
                                f"{', '.join(map(str, seeds[:8]))}{', ...' if len(seeds) > 8 else ''}; are these "
                                "weights trained, and the sampler's settings meant so?")
        return self.codec.decode(x.float())

    def _gradient(self, labels: Tensor | None) -> dict:
        """The classifier's, where there is one."""
        if self.classifier is None:
            return {}
        return {"gradient": classifier_gradient(self.classifier, self.denoiser, labels, self.settings.classifier_scale)}

    def chain(self, denoiser: Denoiser, x: Tensor, noise: SeededNoise, **more) -> Tensor:
        """The sampler's own steps from ``x``, or a scheduler's: what is diffused at the end, (B, C, H, W)."""
        options = {"eps_scaler": self.settings.eps_scaler, "clip_denoised": self.settings.clip and self.codec.bounded,
                   **self._options, **more}
        if self.scheduler is not None:
            return self.scheduler(denoiser, x, noise, **options)
        return SAMPLERS[self.settings.sample_type](denoiser, x, self.times, remedies=self.remedies,
                                                   noise_fn=lambda index: noise.randn(x.shape), **options)

    def told(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the network itself is told: not the labels that are a classifier's alone."""
        return {name: rows for name, rows in condition.items() if name != "labels" or self.num_labels}

    def conditioned(self, condition: dict[str, Tensor]) -> Denoiser:
        """The denoiser under a condition, with guidance as the settings have it."""
        given = self.denoiser.given(self.told(condition))
        if self.settings.guidance is None:
            return given
        if self.guide is None:
            by = self.denoiser.given(without(condition, self.prompts))
        else:
            by = self.guide.given(condition) if self.guide_labels or self.prompts else self.guide
        return given.guided(by, self.settings.guidance, self.settings.guidance_interval)
