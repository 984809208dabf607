"""From seeds to images: the one path that generate.py, Python, diagnosis, studies and the FID while training take."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from configs.sampling import SAMPLE_TYPES, SamplerSettings
from functions.chain import scales_of
from functions.denoiser import Denoiser
from functions.denoising import SAMPLERS, network_calls
from functions.guidance import classifier_gradient
from functions.ode import check_churn
from functions.rng import SeededNoise, derive_seed, parse_seeds
from functions.timesteps import sampling_times
from utils.errors import DivergedError, UserError

LABELS = 1                                                 # stream of an image's own label, beside its noise


def check_settings(settings: SamplerSettings, schedule, codec, model, has_guide: bool = False,
                   num_classes: int = 0) -> list:
    """The times of a chain with these settings, ascending; refuses all that a sampler would refuse on its first step.

    Args:
        schedule, codec: Of the network.
        model: Its section of the configuration.
        has_guide: Whether there is a worse network to guide by.
        num_classes: Classes of a classifier to guide by; 0: there is none.

    Raises:
        UserError: A setting that is not possible with this network.
    """
    try:
        times = sampling_times(schedule, settings.timesteps, settings.skip_type)
        schedule.check_times(times)
        scales_of(settings.eps_scaler, len(times))
        check_churn(settings.churn)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    if settings.clip_denoised and not codec.bounded:
        raise UserError("--clip_denoised: what is diffused here does not lie in [-1, 1] (logits or latents), so that "
                        "there is nothing to clip to; leave it out")
    if settings.var_type == "learned" and not model.gives_variances:
        raise UserError("--var_type learned: this network gives no variances; use fixedlarge or fixedsmall")
    num_labels = model.num_labels
    if settings.classes and not (num_labels or num_classes):
        raise UserError(f"--classes {settings.classes}: this network takes no labels")
    classes_of(settings.classes, num_labels or num_classes)
    if settings.guidance is not None and not (num_labels or has_guide):
        raise UserError(f"--guidance {settings.guidance:g} needs a class-conditional network, or a worse one to guide "
                        "by (--guide_weights)")
    if has_guide and settings.guidance is None:
        raise UserError("--guide_weights needs --guidance, such as 2")
    if bool(num_classes) != bool(settings.classifier_scale):
        raise UserError("--classifier needs --classifier_scale, such as 1" if num_classes else
                        f"--classifier_scale {settings.classifier_scale:g} needs --classifier, a file of weights")
    if num_classes and not hasattr(schedule, "num_timesteps"):
        raise UserError("--classifier needs the steps of a discrete schedule, which it was trained on")
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
        classes = list(parse_seeds(text))
    except ValueError as error:
        raise UserError(f"--classes {text!r} is neither random, none, nor a list such as 3 or 0-9 ({error})") from None
    if max(classes) >= num_labels:
        raise UserError(f"--classes {text}: this network has classes 0 to {num_labels - 1}")
    return classes


class Sampler:
    """A network with settings applied to it.

    Args:
        denoiser: Of the network.
        codec: Between pixels and what is diffused.
        settings: SamplerSettings.
        model: The network's section of the configuration.
        device: Where it computes.
        guide: Denoiser of a worse network, for autoguidance; None: guidance is classifier-free.
        guide_labels: Whether the guide takes labels.
        classifier: ``runners.sampling.classifier.Classifier`` to guide by, or None.

    Raises:
        UserError: Settings that are not possible with this network.
    """

    def __init__(self, denoiser: Denoiser, codec, settings: SamplerSettings, model, device,
                 guide: Denoiser | None = None, guide_labels: bool = False, classifier=None):
        self.denoiser, self.codec, self.settings, self.device = denoiser, codec, settings, device
        self.num_labels, self.guide, self.guide_labels = model.num_labels, guide, guide_labels
        self.classifier, self.num_classes = classifier, classifier.num_classes if classifier else model.num_labels
        self.times = check_settings(settings, denoiser.schedule, codec, model, guide is not None,
                                    self.num_classes if classifier else 0)
        self.classes = classes_of(settings.classes, self.num_classes)
        self._options = {key: getattr(settings, key) for key in ("eta", "var_type", "churn")
                         if key in SAMPLE_TYPES[settings.sample_type]}

    @property
    def calls(self) -> int:
        """Network calls for each image."""
        guided = self.settings.guidance not in (None, 1)
        return network_calls(self.settings.sample_type, len(self.times)) * (1 + guided)

    def labels(self, seeds: Sequence[int]) -> Tensor | None:
        """The label of each image, which its seed decides, long (B,); None where there are none to be told."""
        if not self.num_classes:
            return None
        if self.classes is None:
            labels = [derive_seed(seed, LABELS) % self.num_classes for seed in seeds]
        else:
            labels = [self.classes[seed % len(self.classes)] for seed in seeds]
        return torch.tensor(labels, device=self.device)

    def __call__(self, seeds: Sequence[int], callback: Callable | None = None) -> Tensor:
        """One image for each seed, in [0, 1], (B, C, H, W).

        Raises:
            DivergedError: An image is not finite; names the seeds.
        """
        noise = SeededNoise(seeds, self.device)
        x = noise.randn((len(seeds), *self.codec.shape))
        return self.run(x, noise, self.labels(seeds), callback)

    def run(self, x: Tensor, noise: SeededNoise, labels: Tensor | None = None, callback: Callable | None = None,
            start=None) -> Tensor:
        """The chain from ``x``, to images in [0, 1], (B, C, H, W).

        Args:
            x: A standard normal draw; with ``start`` a draw of q(x_start | x_0), (B, C, H, W).
            noise: Where the chain's later draws come from.
            labels: Long (B,), -1 for none.
            callback: See ``functions.chain.Chain``.
            start: A time of the list at which the chain is entered, instead of the noisiest.
        """
        times = self.times if start is None else self.times[:self.times.index(start) + 1]
        if start is None:
            x = x * self.denoiser.schedule.prior_std(times[-1])
        clip = self.settings.clip and self.codec.bounded
        x = SAMPLERS[self.settings.sample_type](
            self.conditioned(labels), x, times, eps_scaler=self.settings.eps_scaler, clip_denoised=clip,
            noise_fn=lambda index: noise.randn(x.shape), callback=callback, **self._options, **self._gradient(labels))
        bad = ~torch.isfinite(x).flatten(1).all(1)
        if bad.any():
            seeds = [seed for seed, is_bad in zip(noise.seeds, bad.tolist(), strict=True) if is_bad]
            raise DivergedError(f"the chain gave numbers that are not finite for {len(seeds)} image(s), seeds "
                                f"{', '.join(map(str, seeds[:8]))}{', ...' if len(seeds) > 8 else ''}; are these "
                                "weights trained, and the sampler's settings meant so?")
        return self.codec.decode(x)

    def _gradient(self, labels: Tensor | None) -> dict:
        """The classifier's, where there is one."""
        if self.classifier is None:
            return {}
        return {"gradient": classifier_gradient(self.classifier, self.denoiser, labels, self.settings.classifier_scale)}

    def conditioned(self, labels: Tensor | None) -> Denoiser:
        """The denoiser with labels (B,) and guidance as the settings have it."""
        labelled = labels is not None and self.num_labels
        given = self.denoiser.given({"labels": labels}) if labelled else self.denoiser
        if self.settings.guidance is None:
            return given
        if self.guide is None:
            by = self.denoiser.given({"labels": torch.full_like(labels, -1)})
        else:
            by = self.guide.given({"labels": labels}) if self.guide_labels else self.guide
        return given.guided(by, self.settings.guidance, self.settings.guidance_interval)
