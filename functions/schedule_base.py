"""What all schedules share: from a time to the scale of the image and of the noise, x_t = alpha(t) x_0 + sigma(t) n.

Notation:

    level(t) = sigma / alpha      noise over image; rises with t, infinite where alpha is 0

A time is a Python number, and its coefficients are exact Python floats; or a tensor (B,), and they are (B, 1, 1, 1).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import inf, log, sqrt

import torch
from torch import Tensor


class Schedule(ABC):
    """Coefficients of every time, and the times that training sees.

    Attributes:
        start: The noisiest time.
        end: The time of the clean image: alpha 1, sigma 0.
    """

    start: float
    end: float
    skip_type = "uniform"                   # how the steps of a chain are spaced unless somebody says otherwise
    state_dtype = torch.float32             # of x along a chain

    @abstractmethod
    def alpha(self, t, dtype: torch.dtype = torch.float32):
        """Scale of the image: float for a number, (B, 1, 1, 1) of ``dtype`` for a tensor (B,)."""

    @abstractmethod
    def sigma(self, t, dtype: torch.dtype = torch.float32):
        """Scale of the noise, as ``alpha``."""

    def level(self, t, dtype: torch.dtype = torch.float32):
        """sigma / alpha, as ``alpha``; infinite where alpha is 0."""
        alpha, sigma = self.alpha(t, dtype), self.sigma(t, dtype)
        return sigma / alpha if isinstance(t, Tensor) or alpha else inf

    @abstractmethod
    def time(self, level: float) -> float:
        """The time at ``level`` in [0, inf], number or tensor: the inverse of ``level``."""

    @property
    @abstractmethod
    def level_range(self) -> tuple[float, float]:
        """The lowest and the highest finite level that training sees."""

    def prior_std(self, t: float) -> float:
        """A chain whose first executed time is t starts from a normal draw times this."""
        return 1.0

    def network_time(self, t):
        """What a network is told for time t, number or tensor."""
        return t

    @abstractmethod
    def at(self, u: Tensor) -> Tensor:
        """The training time at rank u in [0, 1], float64 (B,); evenly spread u are evenly spread training times."""

    @abstractmethod
    def rank(self, t: Tensor) -> Tensor:
        """The inverse of ``at`` up to rounding: where among the training times t lies, in [0, 1), (B,)."""

    @abstractmethod
    def below(self, t: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k-th training time below t, and whether there is one, each (B,); k = 0 gives t itself, always."""

    @abstractmethod
    def above(self, t: Tensor, k: int) -> Tensor:
        """The k-th training time above t, or the highest where there are not so many, (B,)."""

    def respaced(self, times: Sequence[int]) -> "Schedule":
        """The shorter chain that consists of these times."""
        raise ValueError(f"{type(self).__name__} has no steps to leave out; respacing is for discrete schedules")

    def check_times(self, times: Sequence[float]) -> None:
        """ValueError unless a chain can visit ``times``, ascending."""
        if not times or any(not a < b for a, b in zip(times, times[1:], strict=False)):
            raise ValueError("timesteps must be non-empty, ascending and distinct")
        if not self.end < times[0] or not times[-1] < inf:
            raise ValueError(f"times must lie above {self.end}, given {times[0]} to {times[-1]}")

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Sample q(x_t | x_0) = N(alpha x_0, sigma^2 I), DDPM eq. 4.

        Args:
            x0: Clean images, (B, C, H, W).
            noise: Standard normal draw, same shape.
            t: Times, (B,); ``end`` returns ``x0`` unchanged.
        """
        return self.alpha(t, x0.dtype) * x0 + self.sigma(t, x0.dtype) * noise


def root(value):
    """Square root of a variance, number or tensor, that rounding may have put just below 0."""
    return value.clamp(min=0).sqrt() if isinstance(value, Tensor) else sqrt(max(0.0, value))


def logarithm(value):
    """Natural, of a number or a tensor."""
    return value.log() if isinstance(value, Tensor) else log(value)
