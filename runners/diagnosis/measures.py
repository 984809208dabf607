"""Measures of exposure bias on real images and chains of a run: each rank takes its share, sums are merged.

    diagnosis = Diagnosis(diffusion, open_images(config), settings)
    diagnosis.eps_norms()                     # rows for a table, the same on every rank
"""

import logging
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configs.sampling import SamplerSettings
from datasets.latents import choose_variant
from functions.exposure import (
    ExposureBias,
    Fit,
    Moments,
    accumulated_gaps,
    eps_norm,
    estimation_gap,
    fit_scaler,
    training_norms,
)
from functions.frechet import FeatureStats
from functions.rng import SeededNoise, derive_seed
from runners import distributed
from runners.diffusion import Diffusion
from runners.evaluation.image_pass import choose_subset
from runners.sampling.generation import generate_and_measure
from runners.sampling.sampler import Sampler
from utils.errors import UserError

log = logging.getLogger(__name__)
TRAINING, START, PIXELS, LIKELIHOOD = range(4)             # streams of noise beside the chains' own


class Diagnosis:
    """One run under the measures.

    Args:
        diffusion: With its weights loaded.
        images: ImageStore of real images.
        settings: SamplerSettings.
        num_images: Real images, drawn with ``seed``, and chains.
        batch_size: Images at a time.
        seed: Chain n starts from the latent of ``generate.py``'s image ``seed + n``.

    Raises:
        UserError: The data set has fewer images, or one is asked for.
    """

    def __init__(self, diffusion: Diffusion, images, settings: SamplerSettings, *, num_images: int = 256,
                 batch_size: int = 64, seed: int = 0):
        if not 2 <= num_images <= images.num_images:
            raise UserError(f"--num_images {num_images} is not in 2 to {images.num_images}, the size of {images.name}")
        self.diffusion, self.images, self.settings, self.seed = diffusion, images, settings, seed
        self.schedule, self.sampler = diffusion.schedule, diffusion.sampler(settings)
        self.steps = self.sampler.times
        self.chosen = choose_subset(images.num_images, num_images, seed, images.name)
        self.batch_size = batch_size
        self.share = list(distributed.deal(range(num_images), batch_size))

    # ------------------------------------------------------------------------------------- images, noise and chains

    def real_images(self, title: str, share: list | None = None) -> Iterator[tuple[list[int], Tensor]]:
        """This rank's batches, or those of ``share``: their places among the chosen, and x0 as the network was trained
        on, (B, C, H, W)."""
        share = self.share if share is None else share
        batches = self.images.batches(torch.from_numpy(self.chosen[places]) for _, places in share)
        bar = tqdm(share, desc=title, unit="batch", leave=False, disable=distributed.rank() > 0)
        for (start, places), images in zip(bar, batches, strict=True):
            generator = torch.Generator(images.device).manual_seed(derive_seed(self.seed, PIXELS, start))
            if images.is_floating_point():
                images, _ = choose_variant(images, {})
            yield places, self.diffusion.codec.encode(images, generator).contiguous()

    def noise(self, stream: int, places: Sequence[int], *more: int) -> SeededNoise:
        return SeededNoise([derive_seed(self.seed, stream, place, *more) for place in places], self.diffusion.device)

    def latent(self, places: Sequence[int]) -> tuple[Tensor, SeededNoise, dict[str, Tensor]]:
        """What ``generate.py`` starts from: pure noise, the stream of the draws that follow, and labels; of a
        text-to-image network the captions of the real images."""
        seeds = [self.seed + place for place in places]
        noise = SeededNoise(seeds, self.diffusion.device)
        condition = self.condition(places) if self.sampler.prompts else self.sampler.condition(seeds)
        return noise.randn((len(places), *self.diffusion.codec.shape)), noise, condition

    def diffused(self, x0: Tensor, places: Sequence[int], t: float) -> tuple[Tensor, SeededNoise, dict[str, Tensor]]:
        """A draw of q(x_t | x0), the stream of the draws that follow, and what the images are conditioned on."""
        noise = self.noise(START, places, round(1e6 * t) if isinstance(t, float) else t)
        x = self.schedule.alpha(t) * x0 + self.schedule.sigma(t) * noise.randn(x0.shape)
        return x, noise, self.condition(places)

    def condition(self, places: Sequence[int]) -> dict[str, Tensor]:
        """Of the real images: their labels or captions."""
        indices = torch.as_tensor(self.chosen[places])
        condition = self.diffusion.conditions_of(self.images)(indices)
        return choose_variant(torch.empty(len(indices), 1), condition)[1]

    # ----------------------------------------------------------------------------------------------------- measures

    def training_norms(self) -> FeatureStats:
        """Of the norms of all images at each step, lowest noise first."""
        stats = FeatureStats(len(self.steps))
        for places, x0 in self.real_images("training"):
            draw = partial(self.noise(TRAINING, places).randn, x0.shape)
            denoiser = self.sampler.conditioned(self.condition(places))
            norms = training_norms(denoiser, x0, self.steps, lambda _, draw=draw: draw())
            stats.update(norms.cpu())
        return gathered(stats)

    def sampling_norms(self, sampler: Sampler | None = None) -> dict[str, FeatureStats]:
        """The same along the chains, of ``sampler`` in place of this object's own, by evaluation.

        Returns:
            ``first``: of the first evaluation of each step, at its time. With Heun's method also ``corrector``: of the
            second, at the time where the step ends; the last step has none, nor has the first one from noise alone.
        """
        sampler, count = sampler or self.sampler, len(self.steps)
        heun, alone = sampler.settings.sample_type == "heun", int(self.schedule.alpha(self.steps[-1]) == 0)
        correctors = count - 1 - alone if heun and sampler.settings.alpha == 1 else 0
        stats = {"first": FeatureStats(count), **({"corrector": FeatureStats(correctors)} if correctors > 0 else {})}
        for _, places in tqdm(self.share, "sampling", unit="batch", leave=False, disable=distributed.rank() > 0):
            norms = []                                     # of all calls, from the highest noise to the lowest
            sampler.run(*self.latent(places),
                        watch=lambda t, estimate, norms=norms: norms.append(eps_norm(estimate.eps).float()))
            kinds = {"first": norms[:alone] + norms[alone::2 if heun else 1], "corrector": norms[alone + 1::2]}
            for kind, found in stats.items():
                found.update(torch.stack(kinds[kind][::-1], 1).cpu())
        return {kind: gathered(found) for kind, found in stats.items()}

    def eps_norms(self) -> list[dict]:
        """A row for each evaluation: mean ||eps|| of training and sampling with standard errors, and their ratio."""
        return norm_rows(self.steps, self.training_norms(), self.sampling_norms())

    def exposure(self, starts: Sequence[float | None]) -> list[dict]:
        """delta_s below each start: a time of the list, or None for pure noise; the last s is the sample itself.

        Where churn or a time shift moves a step, it counts as one of its time in the list.
        """
        data = Moments()
        for _, x0 in self.real_images("variance"):
            data.add("x0", x0)
        data = gathered(data.cpu())
        bias = ExposureBias(self.schedule, data)
        for places, x0 in self.real_images("exposure"):
            for start in starts:
                self._record_chain(bias, start, places, x0)
        bias.deviation, bias.share = gathered(bias.deviation.cpu()), gathered(bias.share.cpu())
        visited = [*self.steps[::-1], self.schedule.end]
        return [{"start": "noise" if start is None else start, "s": s, **bias.result(start, s)}
                for start in starts for s in visited if (start, s) in bias.share.sums]

    def _record_chain(self, bias: ExposureBias, start: int | None, places: list[int], real: Tensor) -> None:
        def visit(index, t, x, x0, eps):
            if self.steps[-1 - index] != start:            # where it starts it is q itself, unless that is pure noise
                bias.add(start, self.steps[-1 - index], x, real)

        begin = self.latent(places) if start is None else self.diffused(real, places, start)
        bias.add(start, self.schedule.end, self.sampler.encoded(*begin, visit, start), real)

    def gaps(self) -> list[dict]:
        """||mean d_i|| and the accumulated ||G_j||, i the step and j the next lower, of chains from q(x_highest | x0).

        ``noise_floor`` is what ||mean d_i|| would be on average if d_i had no mean at all.
        """
        gaps, highest = Moments(), self.steps[-1]
        for places, real in self.real_images("gap"):
            self.sampler.run(*self.diffused(real, places, highest), lambda index, t, x, x0, eps, real=real: gaps.add(
                self.steps[-1 - index], estimation_gap(self.schedule, x, eps, real, t)), highest)
        gaps = gathered(gaps.cpu())
        mean = {t: gaps.mean(t) for t in self.steps}
        total = accumulated_gaps(self.schedule, self.steps, mean)
        return [{"t": i, "gap": mean[i].norm().item(), "noise_floor": gaps.standard_error(i) * len(mean[i]) ** 0.5,
                 "next_t": j, "accumulated_gap": total[j].norm().item()}
                for i, j in zip(self.steps[::-1], [*self.steps[-2::-1], self.schedule.end], strict=True)]

    def fit(self, model: str = "auto") -> tuple[Fit, list[dict]]:
        """The epsilon scaling that brings the norms of sampling to those of training, and the rows of both chains."""
        training, known = self.training_norms(), {}

        def norms_of(scaler):
            known[scaler] = self.sampling_norms(self.scaled(scaler))
            first = known[scaler]["first"]
            if not np.isfinite(first.mean).all():
                raise self._diverged(scaler)
            ratio = 100 * first.mean / training.mean - 100
            log.info("eps_scaler %.3g,%.5f: eps-norms %+.2f%% to %+.2f%% off", *scaler, ratio.min(), ratio.max())
            return first

        fit = fit_scaler(norms_of, training, model)
        if distributed.rank() == 0 and self.is_no_correction(fit):
            log.warning("lambda from %.3f to %.3f is no correction of a few percent: long steps or an unfinished "
                        "network bend the norms of this chain more than exposure bias does; try more steps",
                        *self.ends(fit))
        both = {0: known[0.0, 1.0], 1: known[fit.k, fit.b]}
        return fit, [{"scaled": scaled, **row} for scaled in both
                     for row in norm_rows(self.steps, training, both[scaled])]

    def ends(self, fit: Fit) -> tuple[float, float]:
        """lambda at the lowest and the highest noise."""
        return fit.b, fit.b + fit.k * (len(self.steps) - 1)

    def is_no_correction(self, fit: Fit) -> bool:
        """Whether it changes eps by more than a tenth somewhere, or brings the norms no nearer."""
        return bool(max(abs(end - 1) for end in self.ends(fit)) > 0.1 or fit.mismatch >= fit.before)

    def scaled(self, scaler: tuple[float, float]) -> Sampler:
        """This object's sampler with another epsilon scaling."""
        return self.diffusion.sampler(self.settings.model_copy(update={"eps_scaler": scaler}))

    @staticmethod
    def _diverged(scaler) -> UserError:
        error = UserError(f"with eps_scaler {scaler[0]:.3g},{scaler[1]:.4g} the chain gives numbers that are not "
                          "finite; are these weights trained?")
        error.on_all_ranks = True
        return error


def fid_of_scalings(diagnosis: Diagnosis, fit: Fit, num_images: int, reference, inception_weights=None) -> list[dict]:
    """FID of seeds 0 to num_images - 1 with 0, 0.5, 1, 1.5 and 2 times the fitted scaling. Collective."""
    from models.inception import load_inception
    from runners.evaluation.metrics import Evaluation

    net, found = load_inception(inception_weights, diagnosis.diffusion.device), []
    for strength in (0.0, 0.5, 1.0, 1.5, 2.0):
        k, b = strength * fit.k, 1 + strength * (fit.b - 1)
        if min(b, b + k * (len(diagnosis.steps) - 1)) <= 0:
            continue
        results = generate_and_measure(diagnosis.scaled((k, b)), range(num_images), diagnosis.batch_size,
                                       evaluation=Evaluation(reference, net)).results
        found.append({"strength": strength, "k": k, "b": b, "name": results["name"], "fid": results["fid"]})
    return found


def norm_rows(steps: list, training: FeatureStats, sampling: dict[str, FeatureStats]) -> list[dict]:
    """Rows of ``Diagnosis.eps_norms``; ``sampling`` as from ``Diagnosis.sampling_norms``."""
    rows = []
    for evaluation, found in sampling.items():
        count = len(found.mean)                            # of the lowest steps
        (a, error_a), (b, error_b) = ((each.mean[:count], np.sqrt(np.diag(each.cov) / each.count)[:count])
                                      for each in (training, found))
        columns = {"t": np.array(steps)[:count], "training": a, "training_error": error_a, "sampling": b,
                   "sampling_error": error_b, "ratio": b / a, "ratio_error": b / a * np.hypot(error_a / a, error_b / b)}
        rows += [{"evaluation": evaluation, **dict(zip(columns, row, strict=True))}
                 for row in zip(*(c.tolist() for c in columns.values()), strict=True)]
    return rows


def gathered(sums):
    """Moments or FeatureStats of all ranks, in rank order, on every rank. Collective."""
    first, *others = distributed.gather_objects(sums)
    for part in others:
        first.merge(part)
    return first
