"""What one feature pass gives besides FID: KID, precision and recall, Inception Score.

Pure functions of features (N, D) or logits (N, C); what is drawn is drawn from a given seed. Subsets, splits and seed
default to those of torch-fidelity, so that the same features give the same numbers.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SEED = 2020


class KID(NamedTuple):
    mean: float
    std: float                      # over subsets; where a subset is the whole set, the standard error
    std_error: float                # of the mean, over fresh sets of fake features


class Score(NamedTuple):
    mean: float
    std: float                      # over splits


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with k(x, y) = (x.y / D + 1)^3, (N, D) and (M, D), in float64.

    Binkowski et al. 2018, "Demystifying MMD GANs", eq. 4 and section 3.1.
    """
    real, fake = real.double(), fake.double()
    within = _mean_of_others(_kernel(real, real)).mean() + _mean_of_others(_kernel(fake, fake)).mean()
    return float(within - 2 * _kernel(real, fake).mean())


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3                                 # (N, M)


def _mean_of_others(gram: Tensor) -> Tensor:
    return (gram.sum(1) - gram.diagonal()) / (len(gram) - 1)               # (N, N) -> (N,)


def kid(real, fake, *, subsets: int = 100, subset_size: int = 1000, seed: int = SEED) -> KID:
    """Kernel Inception Distance: the mean of ``kernel_distance`` over random subsets.

    Args:
        real, fake: Features, (N, D) and (M, D). Subsets are cut to the smaller set.

    Raises:
        ValueError: The real set has fewer than two features, or the fake one fewer than four.
    """
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    if len(real) < 2 or len(fake) < 4:
        raise ValueError(f"KID needs at least 2 real and 4 fake features, {len(real)} and {len(fake)} given")
    size = min(subset_size, len(real), len(fake))
    random = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        chosen = random.choice(len(fake), size, replace=False), random.choice(len(real), size, replace=False)
        values.append(kernel_distance(real[chosen[1]], fake[chosen[0]]))
    error = kid_error(real, fake, subsets=subsets, subset_size=size, seed=seed)
    return KID(float(np.mean(values)), float(np.std(values)) if size < len(fake) else error, error)


def kid_error(real, fake, *, subsets: int, subset_size: int, seed: int = SEED) -> float:
    """Standard error of ``kid`` over fresh sets of so many fake features; the real ones count as given.

    Deviations over subsets do not give it: subsets overlap, and of a small set each is the whole set. With

        h_i      what image i decides alone: mean_j k(y_i, y_j) - mean_j k(y_i, x_j)
        k~_ij    what two decide together: k(y_i, y_j) without its means over i and over j

    a U-statistic of n images has the variance 4 var h/n + 2 mean k~^2/(n (n - 1)) (Hoeffding 1948; for this one
    Sutherland et al. 2017, "Generative models and model criticism", section 3). Both are estimated from at most 1,000
    fake images, h against all real ones. The mean over ``subsets`` subsets of size m uses images and pairs unevenly,
    which adds (n/m - 1)/subsets and ((n/m)^2 - 1)/subsets of each.
    """
    random, n = np.random.RandomState(seed), len(fake)
    y = fake[random.permutation(n)[:1000]].double()
    count, gram = len(y), _kernel(y, y)
    others = _mean_of_others(gram)                                         # (count,)
    across = sum(_kernel(y, part.double()).sum(1) for part in real.split(4096)) / len(real)              # (count,)
    alone = others - across
    together = gram - others[:, None] - others + others.mean()
    pairs = float(_mean_of_others(together.square()).mean())
    single = max(float(alone.var()) - pairs / (count - 2), 0.0)            # finite sums make h_i noisy by that much
    uneven = n / subset_size
    variance = 4 * single / n * (1 + (uneven - 1) / subsets) \
        + 2 * pairs / (n * (n - 1)) * (1 + (uneven ** 2 - 1) / subsets)
    return variance ** 0.5


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
    shuffled = logits[np.random.RandomState(seed).permutation(n)]
    return _score([shuffled[i * n // splits:(i + 1) * n // splits] for i in range(splits)])


def inception_score_of_blocks(logits, *, block: int = 5000) -> Score:
    """The same as guided-diffusion's evaluator has it: over consecutive blocks, a shorter last one counting equally.

    The order of the images matters: with all of a class in one block, that block sees one class.
    """
    return _score(list(torch.as_tensor(logits).split(block)))


def _score(parts: list[Tensor]) -> Score:
    scores = []
    for part in parts:
        log_p = part.double().log_softmax(1)                               # (n, C)
        divergence = log_p.exp() * (log_p - log_p.exp().mean(0).log())
        scores.append(float(divergence.sum(1).mean().exp()))
    return Score(float(np.mean(scores)), float(np.std(scores)))
