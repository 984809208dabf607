"""From seeds to images: the one path that generate.py, Python, diagnosis, studies and the FID while training take."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from configs.sampling import SamplerSettings, read_by
from functions.chain import scales_of
from functions.denoiser import Denoiser
from functions.ode import check_churn
from functions.rng import SeededNoise, derive_seed, parse_seeds
from runners.conditioning import without
from runners.sampling.schedulers import chain_of
from utils.errors import DivergedError, UserError

LABELS = 1                                                 # stream of an image's own label, beside its noise


def check_settings(settings: SamplerSettings, schedule, codec, num_labels: int, has_guide: bool = False,
                   prompted: bool = False) -> list:
    """The times of a chain with these settings, ascending; refuses all that a sampler would refuse on its first step.

    Args:
        schedule, codec: Of the network.
        num_labels: Size of its label set.
        has_guide: Whether there is a worse network to guide by.
        prompted: Whether it is conditioned on prompts.

    Raises:
        UserError: A setting that is not possible with this network.
    """
    try:
        times = chain_of(settings, schedule).times
        schedule.check_times(times)
        scales_of(settings.eps_scaler, len(times))
        check_churn(settings.churn)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    if settings.clip_denoised and not codec.bounded:
        raise UserError("--clip_denoised: what is diffused here does not lie in [-1, 1] (logits or latents), so that "
                        "there is nothing to clip to; leave it out")
    if settings.classes and not num_labels:
        raise UserError(f"--classes {settings.classes}: this network takes no labels")
    classes_of(settings.classes, num_labels)
    if settings.guidance is not None and not (num_labels or has_guide or prompted):
        raise UserError(f"--guidance {settings.guidance:g} needs a network with classes or prompts, or a worse one to "
                        "guide by (--guide_weights)")
    if has_guide and settings.guidance is None:
        raise UserError("--guide_weights needs --guidance, such as 2")
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
        num_labels: Size of the network's label set; 0: none.
        device: Where it computes.
        guide: Denoiser of a worse network, for autoguidance; None: guidance is classifier-free.
        guide_labels: Whether the guide takes labels.
        prompts: Of a text-to-image network: the condition of each seed, and that of no prompt.

    Raises:
        UserError: Settings that are not possible with this network.
    """

    def __init__(self, denoiser: Denoiser, codec, settings: SamplerSettings, num_labels: int, device,
                 guide: Denoiser | None = None, guide_labels: bool = False, prompts=None):
        self.denoiser, self.codec, self.settings, self.device = denoiser, codec, settings, device
        self.num_labels, self.guide, self.guide_labels, self.prompts = num_labels, guide, guide_labels, prompts
        self.times = check_settings(settings, denoiser.schedule, codec, num_labels, guide is not None,
                                    prompts is not None)
        self.classes = classes_of(settings.classes, num_labels)
        self.chain = chain_of(settings, denoiser.schedule, denoiser.prediction)
        self._options = {key: getattr(settings, key) for key in ("eta", "var_type", "churn")
                         if key in read_by(settings.sample_type)}

    @property
    def calls(self) -> int:
        """Network calls for each image."""
        guided = self.settings.guidance not in (None, 1)
        return self.chain.calls() * (1 + guided)

    def labels(self, seeds: Sequence[int]) -> Tensor | None:
        """The label of each image, which its seed decides, long (B,); None for networks without labels."""
        if not self.num_labels:
            return None
        if self.classes is None:
            labels = [derive_seed(seed, LABELS) % self.num_labels for seed in seeds]
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
            callback: Callable | None = None, start=None) -> Tensor:
        """The chain from ``x``, to images in [0, 1], (B, C, H, W).

        Args:
            x: A standard normal draw; with ``start`` a draw of q(x_start | x_0), (B, C, H, W).
            noise: Where the chain's later draws come from.
            condition: From ``condition``, or that of other images.
            callback: See ``functions.chain.Chain``.
            start: A time of the list at which the chain is entered, instead of the noisiest.
        """
        times = self.times if start is None else self.times[:self.times.index(start) + 1]
        if start is None:
            x = x * self.denoiser.schedule.prior_std(times[-1])
        clip = self.settings.clip and self.codec.bounded
        x = self.chain(self.conditioned(condition or {}), x, times, noise, eps_scaler=self.settings.eps_scaler,
                       clip_denoised=clip, callback=callback, **self._options)
        bad = ~torch.isfinite(x).flatten(1).all(1)
        if bad.any():
            seeds = [seed for seed, is_bad in zip(noise.seeds, bad.tolist(), strict=True) if is_bad]
            raise DivergedError(f"the chain gave numbers that are not finite for {len(seeds)} image(s), seeds "
                                f"{', '.join(map(str, seeds[:8]))}{', ...' if len(seeds) > 8 else ''}; are these "
                                "weights trained, and the sampler's settings meant so?")
        return self.codec.decode(x)

    def conditioned(self, condition: dict[str, Tensor]) -> Denoiser:
        """The denoiser under a condition, with guidance as the settings have it."""
        given = self.denoiser.given(condition)
        if self.settings.guidance is None:
            return given
        if self.guide is None:
            by = self.denoiser.given(without(condition, self.prompts))
        else:
            by = self.guide.given(condition) if self.guide_labels or self.prompts else self.guide
        return given.guided(by, self.settings.guidance, self.settings.guidance_interval)
