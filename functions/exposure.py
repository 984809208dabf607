"""Exposure bias: what a network sees along its own chain, compared with what it saw in training.

Notation (alpha, sigma, level as in ``functions.schedule_base``); all means run over images and their noise:

    ||eps||_i   mean of ||eps(x_i, i)||_2, for x_i ~ q(x_i | x_0) ("training") or along a chain ("sampling");
                EDM-ES (2308.15321), figure 6
    delta_s     Var_chain(x_s) - Var_q(x_s), variances averaged over pixels, images and noise varying jointly
    d_i         eps(x_i, i) - (x_i - alpha_i x_0) / sigma_i along a chain that started from q(. | x_0)
    G_j         (sigma_j r / sigma_i) G_i + alpha_j (1 - r^2) level_i d_i, from G = 0, with r = level_j / level_i: the
                gap accumulated over the ancestral steps down to j; SA-DPM (2312.12431)
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from math import inf, sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from functions.frechet import FeatureStats


class Moments:
    """Mean and variance over images of a vector, under each of several keys such as the steps of a chain.

    Sums in float64 on the device of the values; they merge over batches and ranks. Memory: one vector for each key.
    """

    def __init__(self):
        self.sums: dict[Hashable, tuple[int, Tensor, Tensor]] = {}           # key -> count, sum (D,), sum of squares ()

    def add(self, key: Hashable, values: Tensor) -> None:
        """Values of some more images, (B, ...)."""
        flat = values.detach().flatten(1).double() if values.ndim > 1 else values.detach().double()[:, None]    # (B, D)
        self._put(key, len(flat), flat.sum(0), flat.square().sum())

    def merge(self, other: "Moments") -> "Moments":
        """Add the sums of another share of the images; in place, returns self."""
        for key, sums in other.sums.items():
            self._put(key, *sums)
        return self

    def _put(self, key, count, total, square) -> None:
        before = self.sums.get(key, (0, 0, 0))
        self.sums[key] = (before[0] + count, before[1] + total, before[2] + square)

    def cpu(self) -> "Moments":
        """A copy that can be sent to other processes."""
        copy = Moments()
        copy.sums = {key: (count, total.cpu(), square.cpu()) for key, (count, total, square) in self.sums.items()}
        return copy

    def mean(self, key: Hashable) -> Tensor:
        """(D,)"""
        count, total, _ = self.sums[key]
        return total / count

    def variance(self, key: Hashable) -> float:
        """Over images, divisor count - 1, averaged over the vector."""
        count, total, square = self.sums[key]
        return float(square - total.square().sum() / count) / (len(total) * max(1, count - 1))

    def standard_error(self, key: Hashable) -> float:
        """Of the mean: root mean square over the vector."""
        return sqrt(max(0.0, self.variance(key)) / self.sums[key][0])


def eps_norm(eps: Tensor) -> Tensor:
    """||eps||_2 of each image, (B, C, H, W) -> (B,)."""
    return eps.flatten(1).norm(dim=1)


@torch.no_grad()
def training_norms(denoiser, x0: Tensor, times: Iterable[float], noise_fn) -> Tensor:
    """||eps(x_t, t)|| on q(x_t | x_0) of each image at each time; ``noise_fn(index)`` is called once for each.

    Returns:
        (B, S)
    """
    schedule, norms = denoiser.schedule, []
    for index, t in enumerate(times):
        x = schedule.alpha(t) * x0 + schedule.sigma(t) * noise_fn(index)
        norms.append(eps_norm(denoiser(x, t).eps))
    return torch.stack(norms, 1)


class ExposureBias:
    """delta_s of chains, with its standard error.

    Var_q(x_s) = alpha_s^2 Var(x_0) + sigma_s^2 needs no draws. Deviations are taken from the known mean of q, which
    makes each image's share of delta_s a number of its own: their spread is the standard error. An image and the
    chain that started from it are paired, so that the variance between images cancels.

    Args:
        schedule: Schedule.
        data: Moments of all x_0 under the key ``"x0"``.
    """

    def __init__(self, schedule, data: Moments):
        self.schedule, self.data = schedule, data
        self.deviation, self.share = Moments(), Moments()

    def add(self, key: Hashable, s: float, x: Tensor, x0: Tensor) -> None:
        """A chain's ``x`` at time s, and the images, each (B, C, H, W); results are read under (key, s)."""
        alpha, sigma = self.schedule.alpha(s), self.schedule.sigma(s)
        mean = self.data.mean("x0").view(1, *x.shape[1:]).to(x.device)
        deviation = x.double() - alpha * mean
        expected = alpha**2 * (x0.double() - mean).square() + sigma**2
        self.deviation.add((key, s), deviation)
        self.share.add((key, s), (deviation.square() - expected).flatten(1).mean(1))

    def result(self, key: Hashable, s: float) -> dict[str, float]:
        """Both variances, their difference, its root with sign, and the difference's standard error."""
        alpha, sigma = self.schedule.alpha(s), self.schedule.sigma(s)
        chained, expected = self.deviation.variance((key, s)), alpha**2 * self.data.variance("x0") + sigma**2
        delta = chained - expected
        return {"var_chain": chained, "var_q": expected, "delta": delta,
                "standard_error": self.share.standard_error((key, s)),
                "root_delta": float(np.copysign(sqrt(abs(delta)), delta))}


def estimation_gap(schedule, x: Tensor, eps: Tensor, x0: Tensor, t: float) -> Tensor:
    """d_t: the network's estimate minus the noise that is in ``x`` if the image is ``x0``, (B, C, H, W)."""
    return eps - (x - schedule.alpha(t, x.dtype) * x0) / schedule.sigma(t, x.dtype)


def accumulated_gaps(schedule, times: Sequence[float], gaps: dict[float, Tensor]) -> dict[float, Tensor]:
    """G_j for each time j below the highest of the list, and for the schedule's end.

    Args:
        times: Ascending.
        gaps: d_i of each time of the list, or their means over images: G is linear in them.
    """
    gap, found = torch.zeros(()), {}
    for i, j in zip(times[::-1], [*times[-2::-1], schedule.end], strict=True):
        if schedule.level(i) == inf:                       # noise alone: no image follows from eps there
            found[j] = gap = torch.zeros_like(gaps[i])
            continue
        r = schedule.level(j) / schedule.level(i)
        kept, added = schedule.sigma(j) * r / schedule.sigma(i), schedule.alpha(j) * (1 - r**2) * schedule.level(i)
        gap = kept * gap + added * gaps[i]
        found[j] = gap
    return found


class Fit(NamedTuple):
    k: float
    b: float
    k_error: float           # standard errors, from the spread between images
    b_error: float
    mismatch: float          # median over steps of |log(sampling norm / training norm)|, with this (k, b)
    before: float            # the same without scaling
    runs: int                # chains that were run


# A norm that is further off than 5% counts linearly. A few percent of scaling cannot mend it: such are the last steps
# of a short chain, whose norms a finite step alone bends.
HUBER = 0.05
MODELS = {"constant": np.ones((1, 2)), "linear": np.eye(2)}               # unknowns -> lambda at lowest, highest noise


def fit_scaler(norms_of: Callable[[tuple[float, float]], FeatureStats], training: FeatureStats,
               model: str = "auto") -> Fit:
    """The (k, b) with which the norms along the chain are those of training (after EDM-ES, 2308.15321).

    Args:
        norms_of: (k, b) -> statistics of the unscaled eps-norms of all images along the chain, (N, S) with the lowest
            noise first; always with the same draws.
        training: The same on q(x_t | x_0).
        model: ``constant`` keeps k = 0, ``linear`` fits both, ``auto`` takes the line only where its slope is more
            than two standard errors from 0.
    """
    target, cache = training.mean, {}
    span = max(1, len(target) - 1)

    def stats_of(ends):
        scaler = float(ends[1] - ends[0]) / span, float(ends[0])
        if scaler not in cache:
            cache[scaler] = norms_of(scaler)
        return cache[scaler]

    def residual(ends):
        return np.log(stats_of(ends).mean / target)                         # (S,)

    def fitted(name, start=(1.0, 1.0)):
        ends, inverse = gauss_newton(residual, MODELS[name], np.array(start))
        response = np.array([[-1.0, 1.0], [span, 0.0]]) / span @ inverse     # of k and b to the residuals, (2, S)
        mismatch, before = (float(np.median(np.abs(residual(each)))) for each in (ends, np.ones(2)))
        errors = standard_errors(response, training, stats_of(ends))
        return Fit(float(ends[1] - ends[0]) / span, float(ends[0]), *errors, mismatch, before, len(cache))

    if model != "auto" or len(target) < 3:
        return fitted("constant" if model == "auto" else model)
    constant = fitted("constant")
    linear = fitted("linear", (constant.b, constant.b))
    chosen = linear if abs(linear.k) > 2 * linear.k_error else constant
    return chosen._replace(runs=len(cache))


def standard_errors(response: np.ndarray, *norms: FeatureStats) -> list[float]:
    """Of unknowns that answer log-norms linearly, (unknowns, S), from the covariance of norms over images."""
    covariance = sum(each.cov / np.outer(each.mean, each.mean) / each.count for each in norms)
    return [sqrt(max(0.0, row @ covariance @ row)) for row in response]


def gauss_newton(residual: Callable[[np.ndarray], np.ndarray], basis: np.ndarray, start: np.ndarray, *,
                 tolerance: float = 1e-4, rounds: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Least Huber cost over lambda at the lowest and the highest noise; slopes are differences, taken once.

    Args:
        residual: (2,) -> (S,)
        basis: One row for each unknown, (unknowns, 2).

    Returns:
        The best ends (2,), and how they answer a change of each residual, (2, S).
    """
    slopes = np.stack([(residual(start + 0.01 * row) - residual(start)) / 0.01 for row in basis], 1)     # (S, unknowns)

    def inverse_at(ends):
        weights = (HUBER / np.maximum(np.abs(residual(ends)), HUBER))[:, None] ** 0.5                    # (S, 1)
        return basis.T @ np.linalg.pinv(weights * slopes) * weights.T                                    # (2, S)

    ends = best = start
    for _ in range(rounds):
        change = np.clip(-inverse_at(ends) @ residual(ends), -0.1, 0.1)
        if np.abs(change).max() < tolerance:
            break
        ends = np.clip(ends + change, 0.5, 2.0)
        best = min(best, ends, key=lambda each: huber(residual(each)))
    return best, inverse_at(best)


def huber(residual: np.ndarray) -> float:
    """Squares up to HUBER, lines beyond (Huber 1964)."""
    size = np.abs(residual)
    return float(np.where(size < HUBER, size**2 / 2, HUBER * (size - HUBER / 2)).sum())
