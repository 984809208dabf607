"""Predictions: what a network's output F means. An estimate of the image and of the noise follows from each.

Notation: x = alpha x_0 + sigma n, F the raw output, x_0' and e the estimates of x_0 and n, SNR = alpha^2 / sigma^2.

    name          F is                  x_0'                                         e
    epsilon       n                     (x - sigma F) / alpha                        F                     (2006.11239)
    sample        x_0                   F                                            (x - alpha F) / sigma
    v_prediction  alpha n - sigma x_0   (alpha x - sigma F) / (alpha^2 + sigma^2)    (sigma x + alpha F) / (...)
                                                                                                           (2202.00512)
    flow          n - x_0               (x - sigma F) / (alpha + sigma)              (x + alpha F) / (alpha + sigma)
                                                                                                           (2209.03003)
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Estimate(NamedTuple):
    x0: Tensor                              # (B, C, H, W)
    eps: Tensor                             # (B, C, H, W)
    variance: Tensor | None = None          # learned v = (output + 1)/2 of 2C-channel networks, else None


class Prediction(Protocol):
    perturbation_target: str                # what input perturbation aims at by default, see functions.losses

    def feed(self, schedule, x: Tensor, t) -> tuple[Tensor, Tensor | float]:
        """What the network gets: its input and its time, for t a number or (B,)."""

    def read(self, schedule, x: Tensor, t, raw: Tensor) -> Estimate:
        """The estimate that F stands for; ``raw`` (B, C or 2C, H, W)."""

    def target(self, schedule, x0: Tensor, eps: Tensor, t) -> Tensor:
        """The F that means this x0 and this eps."""

    def round(self, level: float) -> float:
        """The level that the network knows which is nearest to ``level``."""


def coefficients(schedule, t, like: Tensor):
    """(alpha, sigma) at t: floats for a number, else (B, 1, 1, 1) in the type of ``like``."""
    return schedule.alpha(t, like.dtype), schedule.sigma(t, like.dtype)


def split(x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor | None]:
    """F and the learned variance v, or None where the network gives none."""
    channels = x.shape[1]
    if raw.shape[1] == channels:
        return raw, None
    return raw[:, :channels], (raw[:, channels:] + 1) / 2


def refuse_zero(alpha) -> None:
    if not isinstance(alpha, Tensor) and alpha == 0:
        raise ValueError("the chain starts from pure noise (alpha 0), from which a prediction of the noise gives no "
                         "image; use diffusion.prediction v_prediction, or leave out the last step")


class _Plain:
    """Networks that see x and t as they are."""

    def feed(self, schedule, x, t):
        return x, schedule.network_time(t)

    def round(self, level):
        return level


class Epsilon(_Plain):
    perturbation_target = "noise"

    def read(self, schedule, x, t, raw):
        alpha, sigma = coefficients(schedule, t, x)
        refuse_zero(alpha)
        eps, variance = split(x, raw)
        return Estimate((x - sigma * eps) / alpha, eps, variance)

    def target(self, schedule, x0, eps, t):
        return eps


class Sample(_Plain):
    perturbation_target = "unperturbed"

    def read(self, schedule, x, t, raw):
        alpha, sigma = coefficients(schedule, t, x)
        x0, variance = split(x, raw)
        return Estimate(x0, (x - alpha * x0) / sigma, variance)

    def target(self, schedule, x0, eps, t):
        return x0


class Velocity(_Plain):
    perturbation_target = "unperturbed"

    def read(self, schedule, x, t, raw):
        alpha, sigma = coefficients(schedule, t, x)
        v, variance = split(x, raw)
        norm = alpha**2 + sigma**2
        return Estimate((alpha * x - sigma * v) / norm, (sigma * x + alpha * v) / norm, variance)

    def target(self, schedule, x0, eps, t):
        alpha, sigma = coefficients(schedule, t, x0)
        return alpha * eps - sigma * x0


class Flow(_Plain):
    perturbation_target = "unperturbed"

    def read(self, schedule, x, t, raw):
        alpha, sigma = coefficients(schedule, t, x)
        flow, variance = split(x, raw)
        return Estimate((x - sigma * flow) / (alpha + sigma), (x + alpha * flow) / (alpha + sigma), variance)

    def target(self, schedule, x0, eps, t):
        return eps - x0


PREDICTIONS: dict[str, Prediction] = {"epsilon": Epsilon(), "sample": Sample(), "v_prediction": Velocity(),
                                      "flow": Flow()}


def answer_of_x0(prediction: Prediction, schedule, t: Tensor) -> Tensor:
    """d x_0' / dF at times t, (B, 1, 1, 1): every estimate is linear in F."""
    zeros = torch.zeros(len(t), 1, 1, 1, device=t.device)
    return prediction.read(schedule, zeros, t, torch.ones_like(zeros)).x0
