"""How far the FID of n images moves from one set of n images to the next: a standard error, and an interval.

Both belong to the expectation of the FID of n images, at this n. It lies above the FID of infinitely many by a bias
that no interval shows: FIDs of different n stay incomparable. The reference counts as given.

Notation:
    x_i          features of n images, D numbers each; m, S their mean and covariance; N = n - 1
    T            |m - mu|^2 + tr S + tr S_r - 2 tr A^(1/2)  with  A = B^T S B,  B B^T = S_r          (functions.frechet)
    l_j          the r eigenvalues of A; with N - r zeros these are those of its N x N companion
    A^(1/2)      tr A^(1/2) = 1/pi int_0^oo (log det(A + s^2) - log det(s^2)) ds

Resampling with repetitions lowers the rank of S where n < D and moves T by far more than its spread; leaving out one
image does not. All leave-one-out values T_i follow exactly from one eigendecomposition: A loses one direction, so log
det loses log(1 - n/N^2 c_i^T (A + s^2)^(-1) c_i) with c_i = B^T (x_i - m). The jackknife's variance is

    J = (n - 1)/n sum_i (T_i - mean)^2,      E J ~ sum_k k v_k      where      var T = sum_k v_k

with v_k the part that k images decide together (Efron & Stein 1981, "The jackknife estimate of variance"). FID has
large parts beyond k = 1 where S is singular, or both sets are alike. For normal features they are known: with n and D
of one order (Hachem, Loubaton & Najim 2008, "A CLT for information-theoretic statistics of Gram random matrices";
real numbers)

    cov(log det(A + s^2), log det(A + t^2)) = -2 log(1 - xi) = sum_k 2 xi^k/k
    1 - xi(s, t) = (t^2 - s^2) g(s) g(t)/(g(s) - g(t)),      g(s) = 1/N tr (companion + s^2)^(-1)

and the k-th term belongs to v_k, so that J exceeds the variance by the integral of 2 (xi/(1 - xi) + log(1 - xi)), and
by 2 tr S^2/n^2, which is v_2 of |m - mu|^2. What single images decide, J measures on the features as they are, normal
or not. Few images decide much where n is small, and J is then uncertain itself: the interval takes Student's t with
2 n/(kurtosis of the T_i - 1) degrees of freedom, fewer by what the subtraction leaves of J.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from functions.frechet import covariance_root

NODES = 96                   # of the integrals over log s, whose error falls as exp(-10/spacing)
MARGIN = 12.0                # in log s, beyond the roots of the eigenvalues: what is left out is e^-12 of the rest
BLOCK = 4096                 # rows at a time
LEAST_FREEDOM = 4.0
LEAST_IMAGES = 10            # below, what is subtracted often exceeds J where both sets are alike


class Spread(NamedTuple):
    distance: float                 # of the features given
    error: float                    # standard error of it
    freedom: float                  # degrees of freedom that the error was estimated with


def frechet_interval(features, mu, sigma=None, *, root: Tensor | None = None,
                     level: float = 0.95) -> tuple[float, float] | None:
    """Interval for the expectation of the Frechet distance of so many features to N(mu, sigma), about the one observed.

    Args:
        features: (n, D).
        mu, sigma: Reference, (D,) and (D, D), held fixed.
        root: ``covariance_root(sigma)`` instead of ``sigma``, for many intervals to one reference.
        level: Coverage.

    Returns:
        Lower and upper end. None: there are fewer than ten features, or they show no spread, be it that they are all
        the same or that nothing is left of J.
    """
    if len(features) < LEAST_IMAGES:
        return None
    spread = frechet_spread(features, mu, sigma, root=root)
    if spread.error <= 1e-9 * spread.distance:             # rounding
        return None
    reach = student((1 + level) / 2, spread.freedom) * spread.error
    return spread.distance - reach, spread.distance + reach


def student(probability: float, freedom: float) -> float:
    """Quantile of Student's t by Fisher & Cornish 1960, to 2% from 4 degrees of freedom on (at 97.5%)."""
    z = NormalDist().inv_cdf(probability)
    return z + (z ** 3 + z) / (4 * freedom) + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * freedom ** 2)


def frechet_spread(features, mu, sigma=None, *, root: Tensor | None = None) -> Spread:
    """The Frechet distance of ``features`` to N(mu, sigma) and its standard error, 0 where nothing is left of J.

    Arguments as ``frechet_interval``.

    Raises:
        ValueError: Fewer than four features.
    """
    x, mu = torch.as_tensor(features), torch.as_tensor(mu).double().cpu()
    n = len(x)
    if n < 4:
        raise ValueError(f"a standard error of FID needs at least 4 features, {n} given")
    x, mean = x.cpu(), x.double().mean(0).cpu()                                # (n, D), (D,)
    root = covariance_root(sigma) if root is None else root                    # B, (D, k)
    if n <= root.shape[1]:
        eigenvalues, parts, square = _few(x, mean, root)
    else:
        eigenvalues, parts, square = _many(x, mean, root)
    s, step = _nodes(eigenvalues)
    values, fourth = [], 0.0
    for rows, q2 in parts:                                                     # (b, D) centred, (b, r): (c_i . v_j)^2
        norm = rows.square().sum(1)
        fourth += float(norm.square().sum())
        left = 1 - n / (n - 1) ** 2 * (q2 @ (1 / (eigenvalues[:, None] + s ** 2)))
        log_det = (left.clamp(min=1e-300).log() * s).sum(1) * step / math.pi   # (b,): what tr A^(1/2) loses
        values.append(torch.stack([(mean - mu - rows / (n - 1)).square().sum(1), norm, log_det]))
    off_mean, norm, loss = torch.cat(values, 1)                                # (n,) each
    trace, cross = norm.sum() / (n - 1), eigenvalues.sqrt().sum()
    distance = float((mean - mu).square().sum() + trace + root.square().sum() - 2 * cross)
    own = ((n - 1) * trace - n / (n - 1) * norm) / (n - 2)                     # tr S without image i
    without = off_mean + own - 2 * math.sqrt((n - 1) / (n - 2)) * (cross + loss)
    squares = (without - without.mean()).square()
    jackknife = float(squares.sum()) * (n - 1) / n
    pairs = ((n - 1) ** 2 * square - fourth) / (n * (n - 1))                   # tr S^2, free of its bias at small n
    variance = max(jackknife - _excess(eigenvalues, n - 1, s, step) - 2 * pairs / n ** 2, 0.0)
    uncertain = float(squares.var()) / n * (n - 1) ** 2                        # the variance of J
    return Spread(distance, math.sqrt(variance), max(2 * variance ** 2 / max(uncertain, 1e-300), LEAST_FREEDOM))


def _few(x: Tensor, mean: Tensor, root: Tensor):
    """n <= k: eigenvalues of A from the n x n Gram matrix; [(centred rows, q2)]; tr S^2."""
    rows = x.double() - mean
    projected = rows @ root                                                    # c, (n, k)
    eigenvalues, vectors = torch.linalg.eigh(projected @ projected.T / (len(x) - 1))
    eigenvalues = _positive(eigenvalues[1:])                                   # centring has made one of them zero
    q2 = vectors[:, 1:].square() * eigenvalues * (len(x) - 1)
    return eigenvalues, [(rows, q2)], float((rows @ rows.T / (len(x) - 1)).square().sum())


def _many(x: Tensor, mean: Tensor, root: Tensor):
    """n > k: the same from covariances, with the rows in blocks."""
    def blocks():
        for start in range(0, len(x), BLOCK):
            yield x[start:start + BLOCK].double() - mean

    covariance = sum(rows.T @ rows for rows in blocks()) / (len(x) - 1)
    eigenvalues, vectors = torch.linalg.eigh(root.T @ covariance @ root)
    directions = root @ vectors                                                # (D, k)
    parts = ((rows, (rows @ directions).square()) for rows in blocks())
    return _positive(eigenvalues), parts, float(covariance.square().sum())


def _positive(eigenvalues: Tensor) -> Tensor:
    """Rounding leaves zeros a little below zero; a floor far below the largest changes no integral."""
    return eigenvalues.clamp(min=max(float(eigenvalues[-1]), 1e-100) * 1e-15)


def _nodes(eigenvalues: Tensor) -> tuple[Tensor, float]:
    """s, (NODES,), evenly spaced in log s, and the spacing."""
    low, high = (math.log(float(end)) / 2 for end in (eigenvalues[0], eigenvalues[-1]))
    log_s = torch.linspace(low - MARGIN, high + MARGIN, NODES, dtype=torch.float64)
    return log_s.exp(), float(log_s[1] - log_s[0])


def _excess(eigenvalues: Tensor, samples: int, s: Tensor, step: float) -> float:
    """What the jackknife counts too much in the variance of 2 tr A^(1/2): 4 sum_k (k - 1) v_k."""
    companion = torch.cat([eigenvalues.new_zeros(samples - len(eigenvalues)), eigenvalues])[:, None]
    high, low = s ** 2 / (companion + s ** 2), companion / (companion + s ** 2)            # (N, NODES); 1 together
    # xi from differences of the smaller of the two: at the ends of the integrals, 1 less a rounded number is noise.
    small = torch.where(high.mean(0) < 0.5, high, -low)
    small = small - small.mean(0)
    squares = high.T @ high                                                                # (NODES, NODES)
    xi, rest = small.T @ small / squares, high.mean(0)[:, None] * high.sum(0) / squares    # rest = 1 - xi
    density = 2 * (xi / rest + torch.where(xi < 0.5, torch.log1p(-xi.clamp(max=0.5)), rest.log()))
    return float(4 / math.pi ** 2 * (s[:, None] * s * density).sum()) * step ** 2
