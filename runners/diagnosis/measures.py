"""Measures of exposure bias on real images and chains of a run: each rank takes its share, sums are merged.

    diagnosis = Diagnosis(diffusion, open_images(config), settings)
    diagnosis.eps_norms()                     # rows for a table, the same on every rank
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from functions.chain import chain
from functions.denoising import SAMPLERS
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
from functions.pixels import to_model_range
from functions.rng import SeededNoise, derive_seed
from functions.timesteps import sampling_timesteps
from runners import distributed
from runners.diffusion import Diffusion
from runners.evaluation.image_pass import choose_subset
from runners.sampling.generation import NoWriter, deal, generate
from utils.errors import UserError, choose

log = logging.getLogger(__name__)
TRAINING, START, PIXELS = range(3)                         # streams of noise beside the chains' own


class Diagnosis:
    """One run under the measures.

    Args:
        diffusion: With its weights loaded.
        images: ImageStore of real images.
        settings: Keyword arguments of ``Diffusion.chain``.
        num_images: Real images, drawn with ``seed``, and chains.
        batch_size: Images at a time.
        seed: Chain n starts from the latent of ``generate.py``'s image ``seed + n``.

    Raises:
        UserError: The data set has fewer images, or one is asked for.
    """

    def __init__(self, diffusion: Diffusion, images, settings: dict, *, num_images: int = 256, batch_size: int = 64,
                 seed: int = 0):
        if not 2 <= num_images <= images.num_images:
            raise UserError(f"--num_images {num_images} is not in 2 to {images.num_images}, the size of {images.name}")
        self.diffusion, self.images, self.settings, self.seed = diffusion, images, settings, seed
        self.schedule, self.chain = diffusion.schedule, diffusion.chain(**settings)
        self.steps = diffusion.steps(settings["timesteps"], settings["skip_type"])
        self.chosen = choose_subset(images.num_images, num_images, seed, images.name)
        self.batch_size = batch_size
        self.share = deal(list(range(num_images)), batch_size, distributed.rank(), distributed.world_size())

    # ------------------------------------------------------------------------------------- images, noise and chains

    def real_images(self, title: str) -> Iterator[tuple[list[int], Tensor]]:
        """This rank's batches: their places among the chosen, and x0 as the network was trained on, (B, C, H, W)."""
        batches = self.images.batches(torch.from_numpy(self.chosen[places]) for _, places in self.share)
        bar = tqdm(self.share, desc=title, unit="batch", leave=False, disable=distributed.rank() > 0)
        for (start, places), images in zip(bar, batches, strict=True):
            generator = torch.Generator(images.device).manual_seed(derive_seed(self.seed, PIXELS, start))
            yield places, to_model_range(images, self.diffusion.config.data, generator).contiguous()

    def noise(self, stream: int, places: Sequence[int], *more: int) -> SeededNoise:
        return SeededNoise([derive_seed(self.seed, stream, place, *more) for place in places], self.diffusion.device)

    def latent(self, places: Sequence[int]) -> tuple[Tensor, SeededNoise]:
        """What ``generate.py`` starts from: pure noise, and the stream of the draws that follow."""
        noise = SeededNoise([self.seed + place for place in places], self.diffusion.device)
        return noise.randn((len(places), *self.diffusion.config.data.shape)), noise

    def diffused(self, x0: Tensor, places: Sequence[int], t: int) -> tuple[Tensor, SeededNoise]:
        """A draw of q(x_t | x0), and the stream of the draws that follow."""
        noise = self.noise(START, places, t)
        return self.schedule.add_noise(x0, noise.randn(x0.shape), torch.full((len(x0),), t, device=x0.device)), noise

    # ----------------------------------------------------------------------------------------------------- measures

    def training_norms(self) -> FeatureStats:
        """Of the norms of all images at each step, lowest noise first."""
        stats, network = FeatureStats(len(self.steps)), self.diffusion.network()
        for places, x0 in self.real_images("training"):
            draw = partial(self.noise(TRAINING, places).randn, x0.shape)
            norms = training_norms(network, self.schedule, x0, self.steps, lambda _, draw=draw: draw())
            stats.update(norms.cpu())
        return gathered(stats)

    def sampling_norms(self, run: Callable | None = None) -> FeatureStats:
        """The same along the chains; ``run`` takes the place of ``Diffusion.chain`` with this object's settings."""
        stats, run = FeatureStats(len(self.steps)), run or self.chain
        for _, places in tqdm(self.share, "sampling", unit="batch", leave=False, disable=distributed.rank() > 0):
            norms = []                                     # from the highest noise to the lowest
            run(*self.latent(places), lambda index, t, x, x0, eps, norms=norms: norms.append(eps_norm(eps)))
            stats.update(torch.stack(norms[::-1], 1).cpu())
        return gathered(stats)

    def eps_norms(self) -> list[dict]:
        """A row for each step: mean ||eps|| of training and sampling with standard errors, and their ratio."""
        return norm_rows(self.steps, self.training_norms(), self.sampling_norms())

    def exposure(self, starts: Sequence[int | None]) -> list[dict]:
        """delta_s below each start: a step of the list, or None for pure noise; s = -1 is the sample itself."""
        data = Moments()
        for _, x0 in self.real_images("variance"):
            data.add("x0", x0)
        data = gathered(data.cpu())
        bias = ExposureBias(self.schedule, data)
        for places, x0 in self.real_images("exposure"):
            for start in starts:
                self._record_chain(bias, start, places, x0)
        bias.deviation, bias.share = gathered(bias.deviation.cpu()), gathered(bias.share.cpu())
        return [{"start": "noise" if start is None else start, "s": s, **bias.result(start, s)}
                for start in starts for s in reversed([-1, *self.steps]) if (start, s) in bias.share.sums]

    def _record_chain(self, bias: ExposureBias, start: int | None, places: list[int], real: Tensor) -> None:
        last = None

        def visit(index, t, x, x0, eps):
            nonlocal last
            if index or start is None:                     # where it starts it is q itself, unless that is pure noise
                bias.add(start, t, x, real)
            last = x0

        x, noise = self.latent(places) if start is None else self.diffused(real, places, start)
        self.chain(x, noise, visit, start)
        bias.add(start, -1, last, real)                    # the last step of every sampler returns its estimate

    def gaps(self) -> list[dict]:
        """||mean d_i|| and the accumulated ||G_j||, i the step and j the next lower, of chains from q(x_highest | x0).

        ``noise_floor`` is what ||mean d_i|| would be on average if d_i had no mean at all.
        """
        gaps, highest = Moments(), self.steps[-1]
        for places, real in self.real_images("gap"):
            self.chain(*self.diffused(real, places, highest),
                       lambda index, t, x, x0, eps, real=real: gaps.add(
                           t, estimation_gap(self.schedule, x, eps, real, t)))
        gaps = gathered(gaps.cpu())
        mean = {t: gaps.mean(t) for t in self.steps}
        total = accumulated_gaps(self.schedule, self.steps, mean)
        return [{"t": i, "gap": mean[i].norm().item(), "noise_floor": gaps.standard_error(i) * len(mean[i]) ** 0.5,
                 "next_t": j, "accumulated_gap": total[j].norm().item()}
                for _, i, j, _ in chain(self.schedule, self.steps, None)]

    def fit(self, model: str = "auto") -> tuple[Fit, list[dict]]:
        """The epsilon scaling that brings the norms of sampling to those of training, and the rows of both chains."""
        training, known = self.training_norms(), {}

        def norms_of(scaler):
            known[scaler] = self.sampling_norms(self.diffusion.chain(**{**self.settings, "eps_scaler": scaler}))
            if not np.isfinite(known[scaler].mean).all():
                raise self._diverged(scaler)
            ratio = 100 * known[scaler].mean / training.mean - 100
            log.info("eps_scaler %.3g,%.5f: eps-norms %+.2f%% to %+.2f%% off", *scaler, ratio.min(), ratio.max())
            return known[scaler]

        fit = fit_scaler(norms_of, training, model)
        ends = fit.b, fit.b + fit.k * (len(self.steps) - 1)
        if distributed.rank() == 0 and max(abs(end - 1) for end in ends) > 0.1:
            log.warning("lambda from %.3f to %.3f is no correction of a few percent: long steps or an unfinished "
                        "network bend the norms of this chain more than exposure bias does; try more steps", *ends)
        both = {0: known[0.0, 1.0], 1: known[fit.k, fit.b]}
        return fit, [{"scaled": scaled, **row} for scaled in both
                     for row in norm_rows(self.steps, training, both[scaled])]

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
        evaluation, settings = Evaluation(reference, net), {**diagnosis.settings, "eps_scaler": (k, b)}
        for start, seeds, images in generate(diagnosis.diffusion, list(range(num_images)), settings,
                                             diagnosis.batch_size, NoWriter()):
            evaluation.update(images, list(range(start, start + len(seeds))))
        results = evaluation.results()
        found.append({"strength": strength, "k": k, "b": b, "name": results["name"], "fid": results["fid"]})
    return found


def norm_rows(steps: list[int], training: FeatureStats, sampling: FeatureStats) -> list[dict]:
    (a, error_a), (b, error_b) = ((each.mean, np.sqrt(np.diag(each.cov) / each.count)) for each in (training, sampling))
    columns = {"t": np.array(steps), "training": a, "training_error": error_a, "sampling": b, "sampling_error": error_b,
               "ratio": b / a, "ratio_error": b / a * np.hypot(error_a / a, error_b / b)}
    return [dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)]


def gathered(sums):
    """Moments or FeatureStats of all ranks, in rank order, on every rank. Collective."""
    first, *others = distributed.gather_objects(sums)
    for part in others:
        first.merge(part)
    return first


def check_settings(schedule, settings: dict) -> list[int]:
    """The steps of a chain with these settings.

    Raises:
        UserError: A setting that the sampler would refuse on its first step.
    """
    choose(SAMPLERS, settings["sample_type"], "--sample_type")
    if not 0 <= settings["eta"] <= 1:
        raise UserError(f"--eta {settings['eta']} is not in [0, 1]")
    try:
        steps = sampling_timesteps(schedule.num_timesteps, settings["timesteps"], settings["skip_type"], schedule)
        next(chain(schedule, steps, settings["eps_scaler"]))
    except ValueError as error:
        raise UserError(str(error)) from None
    return steps
