"""Gaussian data, on which the exact network of every kind is known."""

import torch

from functions.denoiser import Denoiser
from functions.prediction import PREDICTIONS
from functions.schedule import DiscreteSchedule, Schedule

SCHEDULE = DiscreteSchedule(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))


def abar(t, schedule: Schedule = SCHEDULE) -> float:
    return schedule.alpha(t) ** 2


def variance(t, v: float, schedule: Schedule = SCHEDULE) -> float:
    """Of x_t, for data N(0, v I)."""
    return schedule.alpha(t) ** 2 * v + schedule.sigma(t) ** 2


def exact(v: float, schedule: Schedule = SCHEDULE, prediction="epsilon", mean: float = 0.0, factor: float = 1.0,
          calls: list | None = None) -> Denoiser:
    """The exact denoiser of data N(mean, v I), through a network of the given prediction.

    Args:
        factor: Multiplies the eps that the network means.
        calls: Gets the time of each call.
    """
    kind = PREDICTIONS[prediction] if isinstance(prediction, str) else prediction

    class Exact(Denoiser):
        def raw(self, x, t):
            if calls is not None:
                calls.append(t)
            alpha, sigma = schedule.alpha(t, x.dtype), schedule.sigma(t, x.dtype)
            spread = alpha**2 * v + sigma**2
            x0 = mean + alpha * v * (x - alpha * mean) / spread
            eps = factor * sigma * (x - alpha * mean) / spread
            return kind.target(schedule, x0, eps, t)

    return Exact(None, schedule, kind)
