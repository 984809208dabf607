"""The one loop behind every sampler, and what a step may ask of it: an estimate, a draw of noise.

Notation, for a step from time i to the next lower time j of the list (the last j is the schedule's end):

    e       = eps / lambda_i                        epsilon scaling (2308.15321), lambda_i = 1 without
    x0'     = (x - sigma_i e) / alpha_i             the image that follows; clipped on request, then e follows from it
    level   = sigma / alpha

A remedy (``functions.remedies``) may change the times of a step before it is taken, and its result.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from functions.prediction import Estimate


class Link(NamedTuple):
    """One step of a chain."""

    index: int               # 0 for the first of the list
    i: float | Tensor        # from this time; (B,) where a remedy gives each image its own
    j: float | Tensor        # to this one
    scale: float             # lambda_i
    below: float             # lambda_j, for a second evaluation there
    last: bool               # whether j is the schedule's end


class Chain:
    """What the steps of one sampling run share.

    Args:
        denoiser: Denoiser.
        times: Ascending, distinct; executed from the last to the first, then to the schedule's end.
        eps_scaler: None, b, or (k, b): eps is divided by lambda = k i + b, i = 0 at the lowest noise.
        clip_denoised: Clamp x0' to [-1, 1] and derive e from it again.
        noise_fn: step index -> standard normal draw like x.
        callback: (step_index, t, x, x0', eps): network input, estimate used, eps before scaling; once for each step.
        gradient: (x, t) -> s grad_x log p(y | x), (B, C, H, W): a classifier's guidance (2105.05233, algorithm 2).
        remedies: Of ``functions.remedies``, in the order in which they act.
        start: The time of the list at which the chain is entered; None: the highest. The steps below are those of the
            whole list.

    Attributes:
        x0: The estimate of the newest network call, (B, C, H, W).

    Raises:
        ValueError: Times that the schedule or the list does not have, a scaling that is not above 0, or a remedy
            without meaning here.
    """

    def __init__(self, denoiser, times: Sequence[float], eps_scaler=None, clip_denoised: bool = False,
                 noise_fn: Callable | None = None, callback: Callable | None = None, gradient: Callable | None = None,
                 remedies: Sequence = (), start: float | None = None):
        self.denoiser, self.schedule, self.times = denoiser, denoiser.schedule, list(times)
        self.clip_denoised, self.noise_fn, self.callback, self.gradient = clip_denoised, noise_fn, callback, gradient
        self.schedule.check_times(self.times)
        self.entered = len(self.times) if start is None else self.times.index(start) + 1
        self.scales, self.x0 = scales_of(eps_scaler, len(self.times)), None
        self.remedies = [remedy.on(self.schedule, self.times, denoiser.prediction.round) for remedy in remedies]

    def __len__(self) -> int:
        return len(self.times)

    def links(self):
        """Each step in the order of execution."""
        lower, lower_scales = [self.schedule.end, *self.times], [1.0, *self.scales]
        for n in reversed(range(self.entered)):
            yield Link(len(self.times) - 1 - n, self.times[n], lower[n], self.scales[n], lower_scales[n], n == 0)

    def run(self, x: Tensor, step: Callable) -> Tensor:
        """The sample: ``step(x, link) -> x at time j`` for each link."""
        with torch.no_grad():
            for link in self.links():
                for remedy in self.remedies:
                    link = remedy.before(self, x, link)
                x = step(x, link)
                for remedy in self.remedies:
                    x = remedy.after(self, x, link)
        return x

    def look(self, x: Tensor, link: Link, t=None) -> Estimate:
        """The first evaluation of a step, at time i or where churn has moved x to; the callback sees it."""
        t = link.i if t is None else t
        raw = self.denoiser(x, t)
        estimate = self.adjust(raw, x, t, link.scale)
        if self.callback:
            self.callback(link.index, t, x, estimate.x0, raw.eps)
        return estimate

    def estimate(self, x: Tensor, t, scale: float) -> Estimate:
        """A further evaluation."""
        return self.adjust(self.denoiser(x, t), x, t, scale)

    def adjust(self, estimate: Estimate, x: Tensor, t, scale: float) -> Estimate:
        """Epsilon scaling, then clipping."""
        alpha, sigma = self.schedule.alpha(t, x.dtype), self.schedule.sigma(t, x.dtype)
        x0, eps, variance = estimate
        if scale != 1 and (isinstance(alpha, Tensor) or alpha > 0):        # from pure noise no image follows
            eps = eps / scale
            x0 = (x - sigma * eps) / alpha
        if self.clip_denoised:
            x0 = x0.clamp(-1, 1)
            eps = (x - alpha * x0) / sigma
        self.x0 = x0
        return Estimate(x0, eps, variance)

    def guide(self, estimate: Estimate, x: Tensor, t) -> Estimate:
        """A classifier's gradient on the noise: eps - sigma s grad, x0 accordingly, not clipped again. Where alpha is 0
        no image follows from the noise, and nothing is changed."""
        if self.gradient is None:
            return estimate
        alpha, sigma = self.schedule.alpha(t, x.dtype), self.schedule.sigma(t, x.dtype)
        if not isinstance(alpha, Tensor) and alpha == 0:
            return estimate
        eps = estimate.eps - sigma * self.gradient(x, t)
        self.x0 = (x - sigma * eps) / alpha
        return Estimate(self.x0, eps, estimate.variance)

    @contextmanager
    def unwatched(self):
        """A block whose network calls are not those of a step (see ``Denoiser.watched``)."""
        watched, self.denoiser = self.denoiser, self.denoiser.watched(None)
        try:
            yield
        finally:
            self.denoiser = watched

    def scale_near(self, t: float) -> float:
        """lambda of the time of the list whose level is nearest to that of t."""
        level = self.schedule.level
        return min(zip(self.times, self.scales, strict=True), key=lambda pair: abs(level(pair[0]) - level(t)))[1]

    def draw(self, link: Link) -> Tensor:
        if self.noise_fn is None:
            raise ValueError("this chain draws noise; give noise_fn")
        return self.noise_fn(link.index)


def scales_of(eps_scaler, num_steps: int) -> list[float]:
    """lambda_i of each step, lowest noise first.

    Raises:
        ValueError: A divisor that is not above 0.
    """
    slope, constant = linear_scaler(eps_scaler)
    scales = [slope * i + constant for i in range(num_steps)]
    if not all(0 < scale < inf for scale in scales):
        raise ValueError(f"eps_scaler {eps_scaler} gives a divisor of {min(scales)}; it must stay above 0")
    return scales


def linear_scaler(eps_scaler) -> tuple[float, float]:
    """None, b or (k, b) as (k, b)."""
    if eps_scaler is None:
        return 0.0, 1.0
    return (0.0, float(eps_scaler)) if isinstance(eps_scaler, (int, float)) else tuple(map(float, eps_scaler))
