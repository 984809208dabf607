"""Remedies of exposure bias that change what a network sees in training, beside input perturbation.

Notation (alpha, sigma, level, t_k as in ``functions.losses``): every draw is given, so that a run can be repeated.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rollout(NamedTuple):
    """The draws of scheduled sampling for a shard."""

    chosen: Tensor           # bool (B,): the images that take part
    noise: Tensor            # (m, K, B, C, H, W): at the time where they start, and of all steps but the last


@torch.no_grad()
def scheduled_noise(denoiser, x0: Tensor, t: Tensor, noise: Tensor, rollout: Rollout, min_level: float = 0.0) -> Tensor:
    """The noise that is in x_t after m steps of the network's own chain (scheduled sampling, Deng et al., ICLR 2023).

        x at t + m:  alpha x_0 + sigma n,   then m times, down to t:  x <- alpha x_0'(x) + sigma z

    The result n' = (x_t - alpha_t x_0) / sigma_t takes the place of n in the loss: its input is x_t, its target what
    means x_0 and n'. The last z is ``noise`` itself, so that n' - z = (x_0' - x_0) / level_t. It grows without bound as
    the level falls, hence ``min_level``. Where fewer than m times lie above t, an image starts at the highest.

    Args:
        denoiser: With the condition of the batch; called m times, without gradient.
        x0: (B, C, H, W).
        t: (B,).
        noise: The plain draws, (K, B, C, H, W); ``noise[k]`` belongs to the k-th time below t.
        min_level: Below it the plain noise stays.

    Returns:
        (K, B, C, H, W)
    """
    schedule, K, m = denoiser.schedule, len(noise), len(rollout.noise)
    times = torch.cat([schedule.below(t, k)[0] for k in range(K)])                     # (K*B,)
    clean = x0.repeat(K, 1, 1, 1)                                                      # (K*B, C, H, W)
    draws = [*rollout.noise.flatten(1, 2), noise.flatten(0, 1)]                        # m + 1 of (K*B, C, H, W)
    path = [*(schedule.above(times, s) for s in range(m, 0, -1)), times]            # m + 1 of (K*B,)
    x = schedule.add_noise(clean, draws[0], path[0])
    for i, j, z in zip(path, path[1:], draws[1:], strict=False):
        stepped = schedule.add_noise(denoiser(x, i).x0, z, j)
        x = torch.where((j < i).view(-1, 1, 1, 1), stepped, x)                         # else it waits at the highest
    found = (x - schedule.alpha(times, x.dtype) * clean) / schedule.sigma(times, x.dtype)
    used = rollout.chosen.repeat(K) & (schedule.level(times).flatten() >= min_level) & (times < path[-2])
    return torch.where(used.view(-1, 1, 1, 1), found, noise.flatten(0, 1)).unflatten(0, (K, -1))


def ramp_up(probability: float, ramp: float, progress: float) -> float:
    """A probability that rises linearly from 0 over the share ``ramp`` of a run, at ``progress`` in [0, 1] of it."""
    return probability * min(1.0, progress / ramp) if ramp else probability


def slowed_times(schedule, t: Tensor, u: Tensor, slow_flow: float) -> Tensor:
    """The noisier times at which a network is shown what it is told to be at ``t`` (MixFlow, 2512.19311).

    With tau = 1 - rank(t), which is 0 at pure noise and 1 at the image, the input is that of m = tau (1 - slow_flow u),
    uniform in [(1 - slow_flow) tau, tau].

    Args:
        t: (N,).
        u: Uniform draws in [0, 1), (N,).
        slow_flow: In [0, 1]; 0 is t up to rounding.
    """
    tau = 1 - schedule.rank(t)                                                         # float64 (N,)
    shown = schedule.at(1 - tau * (1 - slow_flow * u))
    return torch.maximum(shown.to(t.dtype), t)                                         # never less noise than told
