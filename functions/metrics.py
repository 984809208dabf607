"""What one feature pass gives besides FID: KID, precision and recall, Inception Score, and an interval for FID.

Pure functions of features (N, D) or logits (N, C); what is drawn is drawn from a given seed. Subsets, splits and seed
default to those of torch-fidelity, so that the same features give the same numbers.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from functions.frechet import FeatureStats, covariance_root, frechet_distance

SEED = 2020


class KID(NamedTuple):
    mean: float
    std: float                      # over subsets
    std_error: float                # of the mean


class Score(NamedTuple):
    mean: float
    std: float                      # over splits


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with k(x, y) = (x.y / D + 1)^3, (N, D) and (M, D), in float64.

    Binkowski et al. 2018, "Demystifying MMD GANs", eq. 4 and section 3.1.
    """
    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_off_diagonal(gram):
        return (gram.sum() - gram.trace()) / (len(gram) * (len(gram) - 1))

    real, fake = real.double(), fake.double()
    within = mean_off_diagonal(kernel(real, real)) + mean_off_diagonal(kernel(fake, fake))
    return float(within - 2 * kernel(real, fake).mean())


def kid(real, fake, *, subsets: int = 100, subset_size: int = 1000, seed: int = SEED) -> KID:
    """Kernel Inception Distance: the mean of ``kernel_distance`` over random subsets.

    Subsets overlap. At most floor(n / subset_size) of them can be disjoint, and only so many are counted as independent
    for the standard error; dividing by the square root of ``subsets`` would promise too much.

    Args:
        real, fake: Features, (N, D) and (M, D). Subsets are cut to the smaller set.

    Raises:
        ValueError: A set has fewer than two features.
    """
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    smaller = min(len(real), len(fake))
    if smaller < 2:
        raise ValueError(f"KID needs at least 2 features in each set, {len(real)} and {len(fake)} given")
    size = min(subset_size, smaller)
    random = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        chosen = random.choice(len(fake), size, replace=False), random.choice(len(real), size, replace=False)
        values.append(kernel_distance(real[chosen[1]], fake[chosen[0]]))
    spread = float(np.std(values))
    return KID(float(np.mean(values)), spread, spread / min(subsets, smaller // size) ** 0.5)


def precision_recall(real, fake, *, k: int = 3, block: int = 4096) -> tuple[float, float]:
    """Improved precision and recall, exact, in memory proportional to block^2.

    Precision is the part of ``fake`` that lies within the distance of some real feature to its k-th neighbour among the
    real ones; recall is the same with the roles exchanged. Kynkaanniemi et al. 2019, eq. 1 and 2.

    Args:
        real, fake: Features, (N, D) and (M, D).

    Raises:
        ValueError: A set has no more than k features.
    """
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need more than k = {k} features, {len(real)} and {len(fake)} given")
    precision = _covered(fake, real, _radii(real, k, block), block)
    recall = _covered(real, fake, _radii(fake, k, block), block)
    return precision, recall


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N, M) in float64, where |a|^2 + |b|^2 - 2 a.b keeps nine digits of a difference."""
    a, b = a.double(), b.double()
    return torch.addmm((b * b).sum(1), a, b.T, alpha=-2).add_((a * a).sum(1)[:, None])


def _radii(points: Tensor, k: int, block: int) -> Tensor:
    """Squared distance of each point to its k-th neighbour among the others, (N,)."""
    radii = []
    for rows in range(0, len(points), block):
        part = points[rows:rows + block]
        nearest = torch.full((len(part), k), torch.inf, dtype=torch.float64, device=points.device)
        for columns in range(0, len(points), block):
            distances = _squared_distances(part, points[columns:columns + block])
            if rows == columns:
                distances.fill_diagonal_(torch.inf)                        # a point is not its own neighbour
            nearest = torch.cat([nearest, distances], 1).topk(k, largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def _covered(points: Tensor, centres: Tensor, radii: Tensor, block: int) -> float:
    """Part of the points that lie in at least one ball."""
    covered = 0
    for rows in range(0, len(points), block):
        part = points[rows:rows + block]
        inside = torch.zeros(len(part), dtype=torch.bool, device=points.device)
        for columns in range(0, len(centres), block):
            distances = _squared_distances(part, centres[columns:columns + block])
            inside |= (distances <= radii[columns:columns + block]).any(1)
        covered += int(inside.sum())
    return covered / len(points)


def inception_score(logits, *, splits: int = 10, seed: int = SEED) -> Score:
    """exp E_x KL(p(y|x) || p(y)), mean and deviation over splits of the shuffled set; Salimans et al. 2016, section 4.

    Args:
        logits: (N, C), without the classifier's bias, as the original TensorFlow code and torch-fidelity have them.

    Raises:
        ValueError: Fewer logits than splits.
    """
    logits = torch.as_tensor(logits)
    n = len(logits)
    if n < splits:
        raise ValueError(f"an Inception Score over {splits} splits needs at least as many images, {n} given")
    order = np.random.RandomState(seed).permutation(n)
    log_p = logits[order].double().log_softmax(1)                          # (N, C)
    scores = []
    for i in range(splits):
        part = log_p[i * n // splits:(i + 1) * n // splits]
        divergence = part.exp() * (part - part.exp().mean(0).log())
        scores.append(float(divergence.sum(1).mean().exp()))
    return Score(float(np.mean(scores)), float(np.std(scores)))


def bootstrap_interval(features, mu, sigma, *, resamples: int = 100, level: float = 0.95,
                       seed: int = SEED) -> tuple[float, float]:
    """Interval for the Frechet distance of ``features`` to N(mu, sigma) from resampling the features.

    A resample has repetitions, hence a smaller effective size and a larger distance than the set itself. The quantiles
    are therefore taken about the mean of the resamples and moved to the distance of the set: they describe its spread.

    Args:
        features: (N, D).
        mu, sigma: Reference, (D,) and (D, D), held fixed.

    Returns:
        Lower and upper end.
    """
    features = torch.as_tensor(features)
    random = np.random.RandomState(seed)
    distance = _distance_of_rows(features, mu, sigma)
    values = np.array([distance(random.randint(len(features), size=len(features))) for _ in range(resamples)])
    ends = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]) - values.mean() + distance(np.arange(len(features)))
    return float(ends[0]), float(ends[1])


def _distance_of_rows(features: Tensor, mu, sigma):
    """A function: indices (M,) -> Frechet distance of features[indices] to N(mu, sigma).

    With B B^T = sigma and Y the centred rows, the cross term needs the eigenvalues of B^T Y^T Y B / (M - 1), (D, D).
    Those of Y B B^T Y^T / (M - 1), (M, M), are the same but for zeros, and far fewer when M < D; centring its rows and
    columns is centring Y.
    """
    root = covariance_root(sigma)                                          # (D, k)
    if len(features) >= features.shape[1]:
        def of_many(rows) -> float:
            stats = FeatureStats(features.shape[1])
            stats.update(features[rows])
            return frechet_distance(mu, sigma, stats.mean, stats.cov, root1=root)

        return of_many
    features, mu = features.double().cpu(), torch.as_tensor(mu).double()
    projected = features @ root                                            # (N, k)
    gram, trace = projected @ projected.T, root.square().sum()             # (N, N), tr sigma

    def of_few(rows) -> float:
        chosen, part = features[rows], gram[rows][:, rows]                 # (M, D), (M, M)
        mean = chosen.mean(0)
        centred = part - part.mean(0) - part.mean(1, keepdim=True) + part.mean()
        cross = torch.linalg.eigvalsh(centred / (len(rows) - 1)).clamp(min=0).sqrt().sum()
        own = (chosen - mean).square().sum() / (len(rows) - 1)
        return float((mean - mu).square().sum() + own + trace - 2 * cross)

    return of_few
