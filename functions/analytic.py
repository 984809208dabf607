"""Analytic variances (Bao et al., Analytic-DPM, 2201.06503): the noise of a step that follows from the size of eps.

Notation (i, j as in ``functions.chain``, d pixels times channels):

    Gamma_i = E ||eps(x_i, i)||^2 / d     over real images with noise, once for a network
    c_i     = clamp(level_i^2 (1 - Gamma_i), 0, 1)              what is left open of x_0 once x_i is known, per pixel
    v       = s^2 + (alpha_j - sqrt(sigma_j^2 - s^2) / level_i)^2 c_i           eq. 9, with s^2 = eta^2 (posterior's)

The ancestral step is eta = 1, where sqrt(sigma_j^2 - s^2) = sigma_j level_j / level_i. A chain with eta 0 draws noise,
too. The last step draws none; on the one before, sqrt(v) is at most ``pixels`` grey levels: v <= (pixels 2/255)^2 pi/2.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import inf, isfinite, log, pi

import numpy as np
import torch
from torch import Tensor

from functions.schedule_base import root


class Gamma:
    """Gamma_t of a network, linear in log level between the times at which it was measured.

    Args:
        times: Ascending.
        values: Gamma at each.
        pixels: Grey levels of the noise on the step before the last in ancestral sampling: 2 with DDPM's linear
            schedule, 1 with the cosine one; None where what is diffused does not lie in [-1, 1].

    Raises:
        ValueError: Lists of different lengths, or a value that is not above 0.
    """

    def __init__(self, times: Sequence[float], values: Sequence[float], pixels: float | None = None):
        if not times or len(times) != len(values) or not all(0 < value < inf for value in values):
            raise ValueError(f"Gamma needs a positive number for each time; given {len(values)} for {len(times)} times")
        if not all(isinstance(number, int | float) and isfinite(number) for number in (*times, pixels or 0)):
            raise ValueError("Gamma needs a number for each time")
        self.times, self.values, self.pixels = list(times), list(values), pixels

    def check(self, times: Sequence[float]) -> None:
        """ValueError unless it was measured over the whole range of ``times``, ascending."""
        if times[0] < self.times[0] or times[-1] > self.times[-1]:
            raise ValueError(f"Gamma was measured at times {self.times[0]:g} to {self.times[-1]:g}, the chain has "
                             f"{times[0]:g} to {times[-1]:g}; measure it at as many steps or more")

    def at(self, schedule, t: float) -> float:
        """Gamma_t, within the measured range."""
        return float(np.interp(log(schedule.level(t)), _log_levels(self, schedule), self.values))

    def open_variance(self, schedule, t, like: Tensor):
        """c_t: a float for a number, (B, 1, 1, 1) in the type of ``like`` for steps (B,) of a discrete schedule."""
        if isinstance(t, Tensor):
            return _open_variances(self, schedule, like.dtype, like.device)[t].view(-1, 1, 1, 1)
        level = schedule.level(t)
        if level == inf:
            return 1.0                                         # of pure noise, about which eps says nothing
        return min(max(level**2 * (1 - self.at(schedule, t)), 0.0), 1.0 if self.pixels else inf)


# A chain asks at every step: what does not depend on the step is kept.


@lru_cache(maxsize=8)
def _log_levels(gamma: Gamma, schedule) -> np.ndarray:
    """Of the times at which Gamma was measured."""
    return np.array([log(schedule.level(t)) for t in gamma.times])


@lru_cache(maxsize=8)
def _open_variances(gamma: Gamma, schedule, dtype: torch.dtype, device: torch.device) -> Tensor:
    """c_t of all steps of a discrete schedule, (T,)."""
    found = [gamma.open_variance(schedule, t, None) for t in range(schedule.num_timesteps)]
    return torch.tensor(found, dtype=dtype, device=device)


def analytic_variance(chain, link, gamma: Gamma, kept, x: Tensor, pixels: float | None):
    """v of a step.

    Args:
        kept: s^2, number or (B, 1, 1, 1).
        pixels: See ``Gamma``; None sets no bound.
    """
    schedule = chain.schedule
    alpha, sigma = schedule.alpha(link.j, x.dtype), schedule.sigma(link.j, x.dtype)
    reach = alpha - root(sigma**2 - kept) / schedule.level(link.i, x.dtype)
    v = kept + reach**2 * gamma.open_variance(schedule, link.i, x)
    if pixels is None or link.index != len(chain) - 2:
        return v
    bound = (pixels * 2 / 255) ** 2 * pi / 2
    return v.clamp(max=bound) if isinstance(v, Tensor) else min(v, bound)
