"""The variational bound of a chain with (learned) variances, in bits per dimension (2102.09672, 2105.05233).

Notation: a chain visits times i_0 < ... < i_{S-1}; k is the index of the step from i = i_k to j = i_{k-1}, and k = 0
that of the last one, to the schedule's end; r = level_j / level_i; v is learned: (output + 1) / 2, without bounds.

    c2, c1           = r sigma_j / sigma_i, alpha_j - c2 alpha_i
    small, large     = ``functions.denoising.step_variances``; small is 0 at k = 0: there it is that of k = 1
    q(x_j | x_i, x0) = N(c1 x0 + c2 x_i, small)
    p(x_j | x_i)     = N(c1 x0' + c2 x_i, large^v small^(1 - v))
    L_k              = KL(q || p), at k = 0 -log p(x0) of 8-bit levels              mean over pixels, / ln 2
"""

from collections.abc import Callable, Iterator, Sequence
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from functions.denoising import step_variances
from functions.losses import LossTerms


class Transitions:
    """c1, c2, log small and log large of every step of a chain, in float64.

    Args:
        schedule: Schedule that ends at the image (``set_alpha_to_one``), else the last variances are 0.
        times: Of the chain, ascending. All steps of a discrete schedule: ``range(T)``.
    """

    def __init__(self, schedule, times: Sequence[float]):
        rows = [self._step(schedule, i, j) for i, j in zip(times, [schedule.end, *times], strict=False)]
        self._table = torch.tensor(rows, dtype=torch.float64).T                        # (4, S)
        c1, c2, small, large = self._table
        small[0] = small[1] if len(rows) > 1 else large[0]     # a chain of one step has no next one
        self._table[2:].log_()
        self._fixed_large = torch.cat([small[:1], large[1:]])                          # (S,)

    @staticmethod
    def _step(schedule, i: float, j: float) -> tuple[float, ...]:
        c2 = schedule.sigma(j) * schedule.level(j) / (schedule.level(i) * schedule.sigma(i))
        return schedule.alpha(j) - c2 * schedule.alpha(i), c2, *step_variances(schedule, i, j)

    def __len__(self) -> int:
        return self._table.shape[1]

    def to(self, device) -> "Transitions":
        """Move the tables; returns self."""
        self._table, self._fixed_large = self._table.to(device), self._fixed_large.to(device)
        return self

    def mean(self, x0: Tensor, x: Tensor, k: Tensor) -> Tensor:
        """Of q(x_j | x_i, x0), or of p with the network's x0'. (B, C, H, W), indices long (B,)."""
        c1, c2 = (_column(row, k, x) for row in self._table[:2])
        return c1 * x0 + c2 * x

    def log_variance(self, k: Tensor, var_type: str = "fixedsmall", v: Tensor | None = None) -> Tensor:
        """Of p; ``fixedsmall`` is that of q, too. ``fixedlarge`` has the small one of k = 1 at k = 0.

        Returns:
            float32, like ``v`` for ``learned``, else (B, 1, 1, 1).

        Raises:
            ValueError: Unknown type, or ``learned`` without v.
        """
        if var_type == "learned" and v is not None:
            small, large = (_column(row, k, v) for row in self._table[2:])
            return v * large + (1 - v) * small
        fixed = {"fixedsmall": self._table[2], "fixedlarge": self._fixed_large}
        if var_type not in fixed:
            raise ValueError(f"var_type {var_type!r} needs a network with learned variance" if var_type == "learned"
                             else f"var_type {var_type!r} is unknown; known: {', '.join(sorted([*fixed, 'learned']))}")
        return fixed[var_type][k].float()[:, None, None, None]


def _column(row: Tensor, k: Tensor, like: Tensor) -> Tensor:
    return row[k].to(like.dtype)[:, None, None, None]                                  # (B, 1, 1, 1)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)) of each element, in nats; all broadcast."""
    difference = log_variance2 - log_variance1
    return 0.5 * (difference - 1 + torch.exp(-difference) + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def level_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the mass that N(mean, variance) has on the 8-bit level of x in [-1, 1], element by element, in nats.

    The two outermost levels reach to infinity. The distribution function is the published tanh approximation.
    """
    scale = torch.exp(-0.5 * log_variance)
    above = _normal_cdf(scale * (x - mean + 1 / 255))
    below = _normal_cdf(scale * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))


def bits_per_dim(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / log(2)                                            # (B,)


def variational_bits(transitions: Transitions, x0: Tensor, x: Tensor, x0_estimate: Tensor, log_variance: Tensor,
                     k: Tensor) -> Tensor:
    """L_k of each image.

    Args:
        transitions: Of the chain, on x0's device.
        x0: Clean images, on the 8-bit levels in [-1, 1], (B, C, H, W).
        x: Noisy images at step k; the perturbed ones where the network saw those.
        x0_estimate: x0'; detached where only the variance is to learn from this.
        log_variance: Of p, ``Transitions.log_variance``.
        k: Indices in the chain, long (B,).
    """
    mean = transitions.mean(x0_estimate, x, k)                                         # (B, C, H, W)
    kl = normal_kl(transitions.mean(x0, x, k), transitions.log_variance(k), mean, log_variance)
    return torch.where(k == 0, bits_per_dim(-level_log_likelihood(x0, mean, log_variance)), bits_per_dim(kl))


# name: (x0' is detached, objective of each image from the simple loss, L_k and S); 2102.09672, eq. 16 for the hybrid.
VARIATIONAL: dict[str, tuple[bool, Callable]] = {
    "hybrid": (True, lambda simple, bits, S: simple + bits),
    "rescaled_hybrid": (True, lambda simple, bits, S: simple + S / 1000 * bits),
    "kl": (False, lambda simple, bits, S: bits),
    "rescaled_kl": (False, lambda simple, bits, S: S * bits),
}


def with_bound(terms: LossTerms, kind: str, denoiser, transitions: Transitions, x0: Tensor, t: Tensor,
               fixed: str = "fixedlarge") -> LossTerms:
    """The loss with the variational bound in it, from the network's output at step t that is there already.

    Args:
        terms: Of ``sequence_aware_loss`` with ``reduce`` mean.
        kind: Name in ``VARIATIONAL``.
        denoiser: The one that ``terms`` are of; on a discrete schedule, all of whose steps ``transitions`` has.
        x0: Clean images, on the 8-bit levels in [-1, 1], (B, C, H, W).
        t: Their steps, long (B,).
        fixed: Variance where the network learns none.
    """
    detached, objective = VARIATIONAL[kind]
    estimate = denoiser.prediction.read(denoiser.schedule, terms.x_t, t, terms.raw)
    log_variance = transitions.log_variance(t, fixed if estimate.variance is None else "learned", estimate.variance)
    x0_estimate = estimate.x0.detach() if detached else estimate.x0
    bits = variational_bits(transitions, x0, terms.x_t, x0_estimate, log_variance, t)
    return terms._replace(total=objective(terms.total, bits, len(transitions)), bits=bits)


class BoundTerms(NamedTuple):
    """Of one step, for each image (B,)."""

    bits: Tensor            # L_k
    x0_error: Tensor        # mean over pixels of (x0' - x0)^2
    eps_error: Tensor       # mean over pixels of (eps' - n)^2, eps' from x0'


@torch.no_grad()
def bound_terms(denoiser, x0: Tensor, times: Sequence[float], *, noise_fn: Callable, var_type: str = "learned",
                clip_denoised: bool = True) -> Iterator[BoundTerms]:
    """The bound's terms, from the noisiest step down to k = 0; each at its own draw of x_i. With ``prior_bits`` they
    sum to the negative log likelihood. Memory does not depend on the number of steps.

    Args:
        denoiser: ``(x, t (B,)) -> Estimate``; its ``schedule`` is the chain's.
        x0: Images on the 8-bit levels in [-1, 1], (B, C, H, W).
        times: Of the chain, ascending.
        noise_fn: step index, from 0 at the noisiest -> standard normal draw like x0.
        var_type: ``learned``, ``fixedlarge`` or ``fixedsmall``.
        clip_denoised: Clamp x0' to [-1, 1].

    Raises:
        ValueError: As ``Transitions.log_variance``.
    """
    schedule, transitions = denoiser.schedule, Transitions(denoiser.schedule, times).to(x0.device)
    for index, k in enumerate(reversed(range(len(times)))):
        noise, alpha, sigma = noise_fn(index), schedule.alpha(times[k]), schedule.sigma(times[k])
        x = alpha * x0 + sigma * noise                                                 # (B, C, H, W)
        estimate = denoiser(x, torch.full((len(x),), times[k], device=x.device))
        x0_estimate = estimate.x0.clamp(-1, 1) if clip_denoised else estimate.x0
        steps = torch.full((len(x),), k, device=x.device)
        log_variance = transitions.log_variance(steps, var_type, estimate.variance)
        yield BoundTerms(variational_bits(transitions, x0, x, x0_estimate, log_variance, steps),
                         (x0_estimate - x0).square().flatten(1).mean(1),
                         ((x - alpha * x0_estimate) / sigma - noise).square().flatten(1).mean(1))


def prior_bits(schedule, x0: Tensor, t: float) -> Tensor:
    """KL(q(x_t | x0) || N(0, I)) at the chain's noisiest time, in bits per dimension, (B,); in float64 inside."""
    variance = torch.tensor(2 * log(schedule.sigma(t)), dtype=torch.float64, device=x0.device)
    zero = torch.zeros_like(variance)
    return bits_per_dim(normal_kl(schedule.alpha(t) * x0.double(), variance, zero, zero)).to(x0.dtype)
