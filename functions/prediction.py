"""Predictions: what a network's output F means. An estimate of the image and of the noise follows from each.

Notation: x = alpha x_0 + sigma n, F the raw output, x_0' and e the estimates of x_0 and n, SNR = alpha^2 / sigma^2.

    name          F is                  x_0'                                         e
    epsilon       n                     (x - sigma F) / alpha                        F                     (2006.11239)
    sample        x_0                   F                                            (x - alpha F) / sigma
    v_prediction  alpha n - sigma x_0   (alpha x - sigma F) / (alpha^2 + sigma^2)    (sigma x + alpha F) / (...)
                                                                                                           (2202.00512)
    flow          n - x_0               (x - sigma F) / (alpha + sigma)              (x + alpha F) / (alpha + sigma)
                                                                                                           (2209.03003)
    edm, vp, ve, iddpm: networks with EDM's preconditioning, see ``functions.preconditioning``
"""

from dataclasses import fields

import torch
from torch import Tensor

from functions.estimate import Estimate, Prediction, coefficients, refuse_zero
from functions.preconditioning import PRECONDITIONERS


def split(x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor | None]:
    """F and the learned variance v, or None where the network gives none."""
    channels = x.shape[1]
    if raw.shape[1] == channels:
        return raw, None
    return raw[:, :channels], (raw[:, channels:] + 1) / 2


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
                                      "flow": Flow(), **{name: kind() for name, kind in PRECONDITIONERS.items()}}


def make_prediction(diffusion) -> Prediction:
    """The prediction of a ``diffusion`` section, with the constants that it gives."""
    kind = PRECONDITIONERS.get(diffusion.prediction)
    if kind is None:
        return PREDICTIONS[diffusion.prediction]
    given = {key.name: getattr(diffusion, key.name) for key in fields(kind)}
    return kind(**{key: value for key, value in given.items() if value is not None})


def answer_of_x0(prediction: Prediction, schedule, t: Tensor) -> Tensor:
    """d x_0' / dF at times t, (B, 1, 1, 1): every estimate is linear in F."""
    zeros = torch.zeros(len(t), 1, 1, 1, device=t.device)
    return prediction.read(schedule, zeros, t, torch.ones_like(zeros)).x0
