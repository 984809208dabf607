"""The training loss: DDPM's L_simple, the sequence-aware term (SA-DPM) and input perturbation (DDPM-IP).

Notation: K = num_consecutive_steps, k = 0..K-1; q(x0, t, n) = sqrt(abar_t) x0 + sqrt(1 - abar_t) n.

    x^(k) = q(x0, t-k, n_k + gamma xi_k)        input; gamma = 0 without perturbation    (2301.11706, algorithm 1)
    d_k   = n_k - eps(x^(k), t-k)               error; the target is the unperturbed n_k
    base  = ||d_0||^2                           DDPM L_simple, summed over pixels as DDIM does
    seq   = ||sum_k m_k d_k||^2 / K^2           m_k = 1 if t >= k else 0                 (2312.12431)
    total = base + lamda seq
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LossTerms(NamedTuple):
    base: Tensor         # (B,)
    sequence: Tensor     # (B,)  unweighted; zeros when lamda = 0
    total: Tensor        # (B,)  base + lamda * sequence


def sequence_aware_loss(model, schedule, x0: Tensor, t: Tensor, noise: Tensor, *, num_consecutive_steps: int = 2,
                        lamda: float = 1.0, input_perturbation: float = 0.0,
                        perturbation_noise: Tensor | None = None) -> LossTerms:
    """Loss of each image; all K evaluations go through one call of ``model``.

    Args:
        model: Callable (x (N, C, H, W), t (N,) long) -> predicted noise (N, C, H, W).
        schedule: NoiseSchedule on the device of ``x0``.
        x0: Clean images in [-1, 1], (B, C, H, W).
        t: Steps in [0, T), long (B,).
        noise: Standard normal draws, (max(K, 1), B, C, H, W); ``noise[k]`` belongs to step t - k. With ``lamda`` 0
            only ``noise[0]`` is used and the rest may be absent.
        num_consecutive_steps: K >= 1, or 0 with ``lamda`` 0.
        lamda: Weight of the sequence term, >= 0; 0 costs one network evaluation whatever K is.
        input_perturbation: gamma >= 0.
        perturbation_noise: xi, shape of ``noise``; required when gamma > 0.

    Raises:
        ValueError: K < 1 with lamda > 0, a negative weight, or missing or misshapen noise.
    """
    K = num_consecutive_steps if lamda > 0 else 1
    _check(K, lamda, input_perturbation, x0, noise, perturbation_noise)

    noise = noise[:K]                                                      # (K, B, C, H, W)
    driver = noise
    if input_perturbation > 0:
        driver = noise + input_perturbation * perturbation_noise[:K]       # (K, B, C, H, W)
    steps = t - torch.arange(K, device=t.device)[:, None]                  # (K, B)  t - k
    mask = (steps >= 0)[..., None, None, None]                             # (K, B, 1, 1, 1)
    steps = steps.clamp(min=0).flatten()                                   # (K*B,)

    x = schedule.add_noise(x0.repeat(K, 1, 1, 1), driver.flatten(0, 1), steps)
    eps = model(x, steps).unflatten(0, (K, -1))                            # (K, B, C, H, W)
    error = mask * (noise - eps)                                           # (K, B, C, H, W)  m_k d_k

    base = _squared_norm(error[0])
    if lamda == 0:
        return LossTerms(base, torch.zeros_like(base), base)
    sequence = _squared_norm(error.sum(0)) / K**2
    return LossTerms(base, sequence, base + lamda * sequence)


def _squared_norm(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)                                    # (B,)


def _check(K, lamda, gamma, x0, noise, xi):
    if K < 1:
        raise ValueError(f"num_consecutive_steps {K} with lamda {lamda}: needs at least 1, or lamda 0")
    if lamda < 0 or gamma < 0:
        raise ValueError(f"lamda and input_perturbation must be >= 0, given {lamda} and {gamma}")
    if len(noise) < K or noise.shape[1:] != x0.shape:
        raise ValueError(f"noise must be ({K}, {', '.join(map(str, x0.shape))}), given {tuple(noise.shape)}")
    if gamma > 0 and (xi is None or xi.shape != noise.shape):
        raise ValueError(f"input_perturbation {gamma} requires perturbation_noise of shape {tuple(noise.shape)}")
