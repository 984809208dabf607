"""Remedies of exposure bias that act while sampling: they change the times of a chain's step, or its result.

Notation (i, j, x0', level as in ``functions.chain``): times of the list are i_S > ... > i_1; j of a step is i of the
next one. Each remedy is one entry of ``REMEDIES``; they act in that order. What else there is against exposure bias:
epsilon scaling (``functions.chain``), analytic variances (``functions.analytic``), churn (``functions.ode``), and in
training ``functions.losses`` and ``functions.training_remedies``.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, floor, sqrt

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from functions.levels import rho_levels
from functions.ode import euler, second_order


class Remedy:
    """What a chain asks of its remedies; each does nothing here."""

    def on(self, schedule, times, rounded=float) -> "Remedy":
        """The remedy made ready for a list of times.

        Args:
            times: Ascending.
            rounded: The level that the network knows which is nearest to a level.

        Raises:
            ValueError: It has no meaning there.
        """
        return self

    def before(self, chain, x: Tensor, link):
        """The link that is taken from x (B, C, H, W) instead of ``link``."""
        return link

    def after(self, chain, x: Tensor, link) -> Tensor:
        """What follows from the step's result x, (B, C, H, W)."""
        return x

    @property
    def calls(self) -> int:
        """Network calls beyond those of the chain, known after ``on``."""
        return 0


@dataclass(frozen=True)
class DCW(Remedy):
    """Move x_j away from x0', each band of a one-level Haar transform by a factor of its own (Yu et al., 2604.16044).

        x_j^f <- x_j^f + lambda^f (x_j^f - x0'^f),   lambda^ll = low w,  lambda^lh,hl,hh = high (1 - w),
        w = sigma_i / sigma_start

    x0' is that of the step's last network call. The ll band of a difference is its mean over blocks of 2x2 pixels, so
    that no transform is needed. Every step is corrected, the last one too; where it ends in x0', as it mostly does,
    nothing changes. It ends elsewhere with ``set_alpha_to_one`` false, in other forms of the flow, and where a
    classifier moves an ancestral mean.

    Args:
        low, high: Of the low band and of the three others.
        pixel: All of x_j by low w.
    """

    low: float
    high: float = 0.0
    pixel: bool = False

    def after(self, chain, x, link):
        if not (self.low or self.high):
            return x
        w = chain.schedule.sigma(link.i, x.dtype) / chain.schedule.sigma(chain.times[-1])
        apart = x - chain.x0
        if self.pixel:
            return x + self.low * w * apart
        smooth = interpolate(avg_pool2d(apart, 2), scale_factor=2, mode="nearest")             # (B, C, H, W)
        return x + self.low * w * smooth + self.high * (1 - w) * (apart - smooth)


@dataclass(frozen=True)
class TimeShift(Remedy):
    """Take an image for one of the time that its variance tells (Li et al., 2305.15583). Discrete schedules only.

        t_s(x, t) = argmin over whole tau in [t - W/2, t + W/2] of |Var(x) - sigma_tau^2|,  Var over one image's pixels

    In their paper's form an image that has reached time j continues as one of time t_s(x_j, j). In their code's form
    the network is told i as ever, and the step leads to t_s(x_i, j), after which the image counts as one of time j.
    Each image has its own t_s. The window ends above j in the paper's form, below i in their code's.

    Args:
        window: W; 0 changes nothing.
        cutoff: Times up to this one are not shifted.
        form: ``paper`` or ``code``.
        data_variance: v_0 in Var(x) = alpha^2 v_0 + sigma^2; published without, 0.
    """

    window: float
    cutoff: float
    form: str = "paper"
    data_variance: float = 0.0

    def on(self, schedule, times, rounded=float):
        if not hasattr(schedule, "num_timesteps"):
            raise ValueError("time_shift looks for whole time steps; this schedule's times are continuous")
        return self

    def before(self, chain, x, link):
        if self.window == 0:
            return link
        if self.form == "paper":
            shifts = link.index > 0 and link.i > self.cutoff
            return link._replace(i=self.time_of(chain, x, link.i, link.j + 1, chain.schedule.start)) if shifts else link
        shifts = not link.last and link.j > self.cutoff
        return link._replace(j=self.time_of(chain, x, link.j, 0, link.i - 1)) if shifts else link

    def time_of(self, chain, x: Tensor, t: int, lowest: int, highest: int) -> Tensor:
        """t_s of each image, long (B,)."""
        schedule, half = chain.schedule, self.window / 2
        near = torch.arange(max(ceil(t - half), lowest), min(floor(t + half), highest) + 1, device=x.device)
        alpha, sigma = schedule.alpha(near, x.dtype), schedule.sigma(near, x.dtype)
        expected = (alpha**2 * self.data_variance + sigma**2).flatten()                        # (N,)
        expected = torch.where(alpha.flatten() > 0, expected, torch.inf)                       # pure noise has no image
        found = x.flatten(1).var(1)[:, None] - expected                                        # (B, N)
        return near[found.abs().argmin(1)]


@dataclass(frozen=True)
class Restart(Remedy):
    """Add noise and integrate back, again and again, which contracts earlier errors (Xu et al., 2306.14878).

    When the chain has reached level MIN, K times:  y += sqrt(MAX^2 - MIN^2) s_noise z,  then N - 1 deterministic steps
    from MAX back to MIN on EDM's rho levels. MIN is the level of the list that is nearest, MAX on a discrete schedule
    that of the nearest step.

    Args:
        intervals: (N, K, MIN, MAX, s_noise) each.
        corrector: Steps of Heun's method; False: of Euler's.
    """

    intervals: tuple[tuple[int, int, float, float, float], ...]
    corrector: bool = True
    planned: tuple = ()                     # (index of the step that ends at MIN, times of N levels, K, s_noise)

    def on(self, schedule, times, rounded=float):
        return replace(self, planned=tuple(self._plan(schedule, times, rounded, *each) for each in self.intervals))

    @staticmethod
    def _plan(schedule, times, rounded, count, repeats, low, high, s_noise):
        reached = times[:-1]                                                                   # by a step of the list
        if count < 2 or not reached:
            raise ValueError(f"restart {count},{repeats},{low:g},{high:g} needs N of at least 2, and a chain of at "
                             "least 2 steps")
        n = min(range(len(reached)), key=lambda n: abs(schedule.level(reached[n]) - low))
        lowest = schedule.level(reached[n])
        if not lowest < high <= schedule.level(times[-1]):
            raise ValueError(f"restart {count},{repeats},{low:g},{high:g}: MAX must lie above the list's level nearest "
                             f"to MIN, {lowest:.4g}, and up to its highest, {schedule.level(times[-1]):.4g}")
        levels = rho_levels(count, lowest, high, getattr(schedule, "rho", 7.0))[1:]
        snapped = {schedule.time(rounded(level)) for level in levels} - {reached[n]}
        if not snapped:
            raise ValueError(f"restart {count},{repeats},{low:g},{high:g}: no time of the schedule lies between MIN "
                             "and MAX")
        return len(times) - 2 - n, (reached[n], *sorted(snapped)), repeats, s_noise

    def after(self, chain, x, link):
        for index, times, repeats, s_noise in self.planned:
            for _ in range(repeats if index == link.index else 0):
                with chain.unwatched():
                    x = self.once(chain, x, link, times, s_noise)
        return x

    def once(self, chain, x, link, times, s_noise):
        schedule, low, high = chain.schedule, times[0], times[-1]
        spread = s_noise * sqrt(schedule.level(high) ** 2 - schedule.level(low) ** 2)
        x = schedule.alpha(high) * (x / schedule.alpha(low) + spread * chain.draw(link))
        for i, j in pairwise(times[::-1]):
            x0, e, _ = chain.guide(chain.estimate(x, i, chain.scale_near(i)), x, i)
            ahead = euler(schedule, x0, e, j)
            x = second_order(chain, x, e, ahead, i, j, chain.scale_near(j)) if self.corrector else ahead
        return x

    @property
    def calls(self):
        each = 2 if self.corrector else 1
        return sum(repeats * each * (len(times) - 1) for _, times, repeats, _ in self.planned)


REMEDIES: dict[str, type[Remedy]] = {"dcw": DCW, "time_shift": TimeShift, "restart": Restart}
