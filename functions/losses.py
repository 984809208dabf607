"""The training loss: DDPM's L_simple, the sequence-aware term (SA-DPM) and input perturbation (DDPM-IP), for any F.

Notation (schedule as in ``functions.schedule_base``, F as in ``functions.prediction``): K = num_consecutive_steps,
k = 0..K-1, t_k the k-th training time below t, m_k = 1 if there is one, else 0.

    x_k   = alpha x_0 + sigma (n_k + gamma xi_k)  at t_k     input; gamma = 0 without perturbation  (2301.11706, alg. 1)
    r_k   = target(x_0, n_k, t_k) - F(x_k, t_k)              error; for eps: n_k - eps(x_k, t_k)
    base  = ||r_0||^2                                        for eps DDPM's L_simple (2006.11239, eq. 14)
    seq   = ||sum_k m_k r_k||^2 / K^2                                                                (2312.12431)
    total = weight(t) (base + lamda seq)

``||.||^2`` is the sum over pixels, as DDIM and SA-DPM have it, or their mean, as ADM, EDM and diffusers do. Only eps
and, for input perturbation, v are published; the rest extends them to other outputs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from functions.prediction import answer_of_x0


class LossTerms(NamedTuple):
    base: Tensor         # (B,)
    sequence: Tensor     # (B,)  without lamda; zeros when lamda = 0
    total: Tensor        # (B,)  weight (base + lamda sequence)
    x_t: Tensor          # (B, C, H, W)  input at step t, and
    raw: Tensor          # (B, C or 2C, H, W)  output there, for the variational term
    bits: Tensor | None = None       # (B,)  that term, in bits per dimension; None without


REDUCTIONS = {
    "sum": lambda square: square.flatten(1).sum(1),                        # (B,)
    "mean": lambda square: square.flatten(1).mean(1),
}


def min_snr(denoiser, t: Tensor, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) on the error of x_0 (2303.09556), as a weight of the error of F, (B,)."""
    squared = (denoiser.schedule.alpha(t) / denoiser.schedule.sigma(t)) ** 2
    return (squared.clamp(max=gamma) * answer_of_x0(denoiser.prediction, denoiser.schedule, t) ** 2).flatten()


WEIGHTS: dict[str, Callable | None] = {"none": None, "min_snr": min_snr}    # (denoiser, t) -> (B,)


def sequence_aware_loss(denoiser, x0: Tensor, t: Tensor, noise: Tensor, *, num_consecutive_steps: int = 2,
                        lamda: float = 1.0, input_perturbation: float = 0.0, perturbation_noise: Tensor | None = None,
                        perturbation_target: str | None = None, weight: str | Callable | None = None,
                        reduce: str = "sum", shown: Callable | None = None) -> LossTerms:
    """Loss of each image; all K evaluations go through one call of the network.

    Args:
        denoiser: Denoiser, with the condition of the batch.
        x0: Clean images in the range of the chain, (B, C, H, W).
        t: Training times of its schedule, (B,).
        noise: Standard normal draws, (max(K, 1), B, C, H, W); ``noise[k]`` belongs to t_k. With ``lamda`` 0 only
            ``noise[0]`` is used and the rest may be absent.
        num_consecutive_steps: K >= 1, or 0 with ``lamda`` 0.
        lamda: Weight of the sequence term, >= 0; 0 costs one network evaluation whatever K is.
        input_perturbation: gamma >= 0.
        perturbation_noise: xi, shape of ``noise``; required when gamma > 0.
        perturbation_target: What the network should mean at a perturbed input. ``noise``: n, which makes the image
            x_0 + level gamma xi (DDPM-IP's principle); ``unperturbed``: what it should mean without (for v as published
            with SDXL trainers). The same for eps. None: ``noise`` for eps and EDM's preconditioned outputs,
            ``unperturbed`` for sample, v and flow, where the other has targets without bound as alpha -> 0.
        weight: Name in ``WEIGHTS``, or a function (denoiser, t) -> (B,).
        reduce: ``sum`` or ``mean`` over pixels.
        shown: times (K*B,) -> those at which the inputs are made, of which the network is not told; None: the same.

    Raises:
        ValueError: K < 1 with lamda > 0, a negative weight, missing or misshapen noise, an unknown name.
    """
    K = num_consecutive_steps if lamda > 0 else 1
    _check(K, lamda, input_perturbation, x0, noise, perturbation_noise)
    schedule, prediction, norm = denoiser.schedule, denoiser.prediction, _known(REDUCTIONS, reduce, "reduce")

    noise = noise[:K].flatten(0, 1)                                        # (K*B, C, H, W)
    steps, exists = zip(*(schedule.below(t, k) for k in range(K)), strict=True)
    steps, exists = torch.cat(steps), torch.cat(exists).view(-1, 1, 1, 1)  # (K*B,), (K*B, 1, 1, 1)
    x0 = x0.repeat(K, 1, 1, 1)                                             # (K*B, C, H, W)
    driver, meant = noise, x0
    if input_perturbation > 0:
        shift = input_perturbation * perturbation_noise[:K].flatten(0, 1)  # (K*B, C, H, W)
        driver = noise + shift
        aim = perturbation_target or prediction.perturbation_target
        meant = _known(PERTURBATION_TARGETS, aim, "perturbation_target")(schedule, x0, shift, steps)

    x = schedule.add_noise(x0, driver, steps if shown is None else shown(steps))
    raw = denoiser.raw(x, steps)                                           # (K*B, C or 2C, H, W)
    error = prediction.target(schedule, meant, noise, steps) - raw[:, :x0.shape[1]]
    error = (exists * error).unflatten(0, (K, -1))                         # (K, B, C, H, W)  m_k r_k

    base = norm(error[0].square())
    sequence = norm(error.sum(0).square()) / K**2 if lamda > 0 else torch.zeros_like(base)
    total = base + lamda * sequence if lamda > 0 else base
    weight = _known(WEIGHTS, weight, "weight") if isinstance(weight, str) else weight
    if weight is not None:
        total = weight(denoiser, t) * total
    return LossTerms(base, sequence, total, x[:len(t)], raw[:len(t)])


# The image that the network should mean, from x_0 and gamma xi at times t.
PERTURBATION_TARGETS = {
    "noise": lambda schedule, x0, shift, t: x0 + schedule.level(t, x0.dtype) * shift,
    "unperturbed": lambda schedule, x0, shift, t: x0,
}


def _known(registry: dict, name: str, what: str):
    if name not in registry:
        raise ValueError(f"{what} {name!r} is unknown; known: {', '.join(sorted(registry))}")
    return registry[name]


def _check(K, lamda, gamma, x0, noise, xi):
    if K < 1:
        raise ValueError(f"num_consecutive_steps {K} with lamda {lamda}: needs at least 1, or lamda 0")
    if lamda < 0 or gamma < 0:
        raise ValueError(f"lamda and input_perturbation must be >= 0, given {lamda} and {gamma}")
    if len(noise) < K or noise.shape[1:] != x0.shape:
        raise ValueError(f"noise must be ({K}, {', '.join(map(str, x0.shape))}), given {tuple(noise.shape)}")
    if gamma > 0 and (xi is None or xi.shape != noise.shape):
        raise ValueError(f"input_perturbation {gamma} requires perturbation_noise of shape {tuple(noise.shape)}")
