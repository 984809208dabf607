"""From seeds to images: the one path that generate.py, Python, diagnosis, studies and the FID while training take."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from configs.sampling import SamplerSettings
from functions.chain import scales_of
from functions.denoiser import Denoiser
from functions.guidance import classifier_gradient
from functions.ode import check_churn
from functions.prediction import make_prediction
from functions.rng import SeededNoise, derive_seed, parse_seeds
from functions.schedule import make_schedule
from runners.conditioning import without
from runners.sampling.gamma import GammaFile
from runners.sampling.steps import calls_of, form_of, remedies_of, steps_of, times_of
from utils.errors import DivergedError, UserError

LABELS = 1                                                 # stream of an image's own label, beside its noise


def check_settings(settings: SamplerSettings, config, codec, *, guide_labels: int | None = None,
                   num_classes: int = 0) -> list:
    """The times of a chain with these settings, ascending; refuses all that a sampler would refuse on its first step.

    Args:
        config: Of the network.
        codec: Its own.
        guide_labels: Size of the label set of a worse network to guide by; None: there is none.
        num_classes: Classes of a classifier to guide by; 0: there is none.

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
    has_guide = guide_labels is not None
    if settings.guidance is not None and not (num_labels or has_guide or model.prompted):
        raise UserError(f"--guidance {settings.guidance:g} needs a network with classes or prompts, or a worse one to "
                        "guide by (--guide_weights)")
    if has_guide and settings.guidance is None:
        raise UserError("--guide_weights needs --guidance, such as 2")
    if guide_labels and guide_labels != (num_labels or num_classes):
        raise UserError(f"--guide_weights: that network is told {guide_labels} classes, this one "
                        f"{num_labels or num_classes or 'none'}; give one that is told as many, or none")
    if bool(num_classes) != bool(settings.classifier_scale):
        raise UserError("--classifier needs --classifier_scale, such as 1" if num_classes else
                        f"--classifier_scale {settings.classifier_scale:g} needs --classifier, a file of weights")
    if num_classes and num_labels not in (0, num_classes):
        raise UserError(f"--classifier tells {num_classes} classes apart, the network has {num_labels}")
    return times


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
        guide_labels: Size of the guide's label set.
        classifier: ``runners.sampling.classifier.Classifier`` to guide by, or None.
        gamma: GammaFile of ``settings.gamma``.
        prompts: Of a text-to-image network: the condition of each seed, and that of no prompt.

    Raises:
        UserError: Settings that are not possible with this network.
    """

    def __init__(self, denoiser: Denoiser, codec, settings: SamplerSettings, config, device,
                 guide: Denoiser | None = None, guide_labels: int = 0, *, classifier=None,
                 gamma: GammaFile | None = None, prompts=None):
        self.denoiser, self.codec, self.settings, self.device = denoiser, codec, settings, device
        self.num_labels, self.guide, self.guide_labels = config.model.num_labels, guide, guide_labels
        self.classifier, self.num_classes = classifier, classifier.num_classes if classifier else self.num_labels
        self.prompts = prompts
        self.times = check_settings(settings, config, codec, guide_labels=None if guide is None else guide_labels,
                                    num_classes=self.num_classes if classifier else 0)
        self.classes = classes_of(settings.classes, self.num_classes)
        self._steps = steps_of(settings, denoiser.schedule, denoiser.prediction, self.times,
                               gamma and check_gamma(gamma, self.times))

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
        """The chain from ``x``, to images in [0, 1], (B, C, H, W); arguments as ``encoded``."""
        return self.codec.decode(self.encoded(x, noise, condition, callback, start, watch))

    def encoded(self, x: Tensor, noise: SeededNoise, condition: dict[str, Tensor] | None = None,
                callback: Callable | None = None, start=None, watch: Callable | None = None) -> Tensor:
        """The chain from ``x`` to its end, in the range of what is diffused, (B, C, H, W).

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
        return x.float()

    def _gradient(self, labels: Tensor | None) -> dict:
        """The classifier's, where there is one."""
        if self.classifier is None:
            return {}
        return {"gradient": classifier_gradient(self.classifier, self.denoiser, labels, self.settings.classifier_scale)}

    def chain(self, denoiser: Denoiser, x: Tensor, noise: SeededNoise, **more) -> Tensor:
        """The sampler's own steps from ``x``, or a scheduler's: what is diffused at the end, (B, C, H, W)."""
        return self._steps(denoiser, x, noise, clip_denoised=self.settings.clip and self.codec.bounded, **more)

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
