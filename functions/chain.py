"""What every sampler does at a step: check the list, call the network, estimate x0, draw noise.

Notation, for a step from i to the next lower j of the list (the last j is -1, abar_{-1} = 1):

    eps       network output at (x, i)
    e         = eps / lambda_i                            epsilon scaling (2308.15321), lambda_i = 1 without
    x0'       = (x - sqrt(1 - abar_i) e) / sqrt(abar_i)   DDIM (2010.02502), eq. 9
    sigma_t   = sqrt((1 - abar_t) / abar_t)               noise level of x / sqrt(abar_t), EDM (2206.00364)
"""

from collections.abc import Iterator, Sequence
from math import inf, sqrt

import torch
from torch import Tensor


def chain(schedule, timesteps: Sequence[int], eps_scaler) -> Iterator[tuple[int, int, int, float]]:
    """(step_index, i, j, lambda_i) of each executed step; checks the list and the scaling before the first."""
    steps = list(timesteps)
    if not steps or any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
        raise ValueError("timesteps must be non-empty, ascending and distinct")
    if steps[0] < 0 or steps[-1] >= schedule.num_timesteps:
        raise ValueError(f"timesteps must lie in [0, {schedule.num_timesteps}), given {steps[0]} to {steps[-1]}")
    slope, constant = linear_scaler(eps_scaler)
    scales = [slope * i + constant for i in range(len(steps))]
    if not all(0 < scale < inf for scale in scales):
        raise ValueError(f"eps_scaler {eps_scaler} gives a divisor of {min(scales)}; it must stay above 0")
    lower = [-1, *steps]
    for i in reversed(range(len(steps))):
        yield len(steps) - 1 - i, steps[i], lower[i], scales[i]


def linear_scaler(eps_scaler) -> tuple[float, float]:
    """None, b or (k, b) as (k, b)."""
    if eps_scaler is None:
        return 0.0, 1.0
    return (0.0, float(eps_scaler)) if isinstance(eps_scaler, (int, float)) else tuple(map(float, eps_scaler))


def estimate(model, schedule, x: Tensor, t: int, scale: float, clip_denoised: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One network call: (eps, x0', e), each (B, C, H, W). A clipped x0' gives e anew."""
    abar = schedule.exact_alpha_bar(t)
    eps = model(x, torch.full((len(x),), float(t), device=x.device))        # t float32 (B,)
    e = eps / scale
    x0 = (x - sqrt(1 - abar) * e) / sqrt(abar)
    if clip_denoised:
        x0 = x0.clamp(-1, 1)
        e = direction(schedule, x, x0, t)
    return eps, x0, e


def direction(schedule, x: Tensor, x0: Tensor, t: int) -> Tensor:
    """The noise in ``x`` if ``x0`` was the image: the estimate above solved for e."""
    abar = schedule.exact_alpha_bar(t)
    return (x - sqrt(abar) * x0) / sqrt(1 - abar)


def sigma(schedule, t: int) -> float:
    """sigma_t; 0 for t = -1."""
    abar = schedule.exact_alpha_bar(t)
    return sqrt((1 - abar) / abar)


def nearest_time(schedule, level: float) -> int:
    """The step whose sigma_t is nearest to ``level``."""
    return min(range(schedule.num_timesteps), key=lambda t: abs(sigma(schedule, t) - level))


def draw(noise_fn, index: int) -> Tensor:
    if noise_fn is None:
        raise ValueError("this chain draws noise; give noise_fn")
    return noise_fn(index)
