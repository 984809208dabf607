"""EDM's preconditioned networks (Karras et al., 2206.00364, table 1): what they are fed, and what their output means.

Notation: y = x / alpha = x_0 + s n the image at noise level s = sigma(t) / alpha(t), D the denoiser, F the raw network
output, d = sigma_data:

    D(y; s) = c_skip y + c_out F(c_in y, c_noise),    x_0' = D,    e = (y - D) / s

    name    c_skip           c_out                c_in               c_noise           e
    edm     d^2/(s^2 + d^2)  s d/sqrt(s^2 + d^2)  1/sqrt(s^2 + d^2)  ln(s)/4           s/(s^2 + d^2) y
                                                                                         - d/sqrt(s^2 + d^2) F
    vp      1                -s                   1/sqrt(s^2 + 1)    (M - 1) time(s)   F
    ve      1                s                    1                  ln(s/2)           -F
    iddpm   1                -s                   1/sqrt(s^2 + 1)    M - 1 - index(s)  F, the first half of the output

The e of the table never subtracts D from y, of which little is left in float32 at a low level. On a DDPM schedule the
c_in y of vp and iddpm is x_t itself.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from math import inf, log

import torch
from torch import Tensor

from functions.estimate import Estimate, coefficients, refuse_zero
from functions.levels import (
    BETA_D,
    BETA_MIN,
    EPSILON_T,
    SIGMA_MAX_VE,
    SIGMA_MIN_VE,
    M,
    iddpm_chain,
    nearest,
    vp_time,
)


class _Preconditioned(ABC):
    """What the four share. Levels are floats, or tensors (B, 1, 1, 1).

    Attributes:
        sigma_min, sigma_max: Levels that networks of this kind are trained at; step lists stay between them.
        perturbation_target: What input perturbation aims at, see ``functions.losses``.
    """

    perturbation_target = "noise"

    @abstractmethod
    def c_in(self, s):
        """A float, or a tensor in the shape of s."""

    @abstractmethod
    def c_noise(self, s):
        """A float, or a tensor in the shape of s."""

    @abstractmethod
    def denoised(self, y: Tensor, s, raw: Tensor) -> Tensor:
        """D."""

    @abstractmethod
    def noise(self, y: Tensor, s, raw: Tensor) -> Tensor:
        """e."""

    @abstractmethod
    def answer(self, x0: Tensor, eps: Tensor, s) -> Tensor:
        """F* = (x0 - c_skip y)/c_out with y = x0 + s eps."""

    def feed(self, schedule, x: Tensor, t) -> tuple[Tensor, Tensor | float]:
        """c_in y (B, C, H, W), and c_noise: a float where t is one, else (B,)."""
        y, s = _unscaled(schedule, x, t)
        c_noise = self.c_noise(s)
        return self.c_in(s) * y, c_noise.flatten() if isinstance(c_noise, Tensor) else c_noise

    def read(self, schedule, x: Tensor, t, raw: Tensor) -> Estimate:
        """The estimate that F stands for; further channels of ``raw`` are ignored."""
        y, s = _unscaled(schedule, x, t)
        raw = raw[:, :x.shape[1]]
        return Estimate(self.denoised(y, s, raw), self.noise(y, s, raw))

    def target(self, schedule, x0: Tensor, eps: Tensor, t) -> Tensor:
        """The F that means this x0 and this eps."""
        return self.answer(x0, eps, _unscaled(schedule, x0, t)[1])

    def round(self, level: float) -> float:
        return level


def _unscaled(schedule, x: Tensor, t) -> tuple[Tensor, Tensor | float]:
    """(y, s); raises ValueError where alpha is 0 and t a number."""
    alpha, sigma = coefficients(schedule, t, x)
    refuse_zero(alpha)
    return x / alpha, sigma / alpha


@dataclass(frozen=True)
class EDM(_Preconditioned):
    sigma_data: float = 0.5
    sigma_min: float = 0.0
    sigma_max: float = inf

    def c_in(self, s):
        return (s**2 + self.sigma_data**2) ** -0.5

    def c_noise(self, s):
        return _log(s) / 4

    def denoised(self, y, s, raw):
        d = self.sigma_data
        return d**2 / (s**2 + d**2) * y + s * d * self.c_in(s) * raw

    def noise(self, y, s, raw):
        return s / (s**2 + self.sigma_data**2) * y - self.sigma_data * self.c_in(s) * raw

    def answer(self, x0, eps, s):
        return (s / self.sigma_data * x0 - self.sigma_data * eps) * self.c_in(s)             # y's share is taken out


class _NoiseNetwork(_Preconditioned):
    """F is the noise, seen through c_in y with variance 1 where the data have it."""

    def c_in(self, s):
        return (s**2 + 1) ** -0.5

    def denoised(self, y, s, raw):
        return y - s * raw

    def noise(self, y, s, raw):
        return raw

    def answer(self, x0, eps, s):
        return eps


@dataclass(frozen=True)
class VP(_NoiseNetwork):
    beta_d: float = BETA_D
    beta_min: float = BETA_MIN

    @property
    def sigma_min(self) -> float:
        """s(1e-5) as float32 has it, 2^-10: the step lists of published networks depend on that rounding."""
        return self._single(EPSILON_T)

    @property
    def sigma_max(self) -> float:
        return self._single(1.0)

    def _single(self, t: float) -> float:
        exponent = torch.tensor(0.5 * self.beta_d * t**2 + self.beta_min * t)
        return (exponent.exp() - 1).sqrt().item()

    def c_noise(self, s):
        level = s.float() if isinstance(s, Tensor) else torch.tensor(s, dtype=torch.float32)
        time = (M - 1) * vp_time(level, self.beta_d, self.beta_min)
        return time if isinstance(s, Tensor) else time.item()


@dataclass(frozen=True)
class VE(_Preconditioned):
    sigma_min: float = SIGMA_MIN_VE
    sigma_max: float = SIGMA_MAX_VE

    def c_in(self, s):
        return 1.0

    def c_noise(self, s):
        return _log(s / 2)

    def denoised(self, y, s, raw):
        return y + s * raw

    def noise(self, y, s, raw):
        return -raw

    def answer(self, x0, eps, s):
        return -eps


@dataclass(frozen=True)
class IDDPM(_NoiseNetwork):
    """Knows the levels u_j of one chain only; c_noise counts them from the image up."""

    @property
    def sigma_min(self) -> float:
        return iddpm_chain()[M - 1]

    @property
    def sigma_max(self) -> float:
        return iddpm_chain()[0]

    def c_noise(self, s):
        if not isinstance(s, Tensor):
            return float(M - 1 - iddpm_chain().index(nearest(iddpm_chain(), s)))
        return M - 1 - (_iddpm_levels(s.device) - s.float()).abs().argmin(dim=-1, keepdim=True).float()

    def round(self, level: float) -> float:
        """The nearest u_j."""
        return nearest(iddpm_chain(), level)


@cache
def _iddpm_levels(device: torch.device) -> Tensor:
    """u, float32 (M + 1,), made once: a copy to a GPU waits for it."""
    return torch.tensor(iddpm_chain(), dtype=torch.float32, device=device)


def _log(s):
    """Rounded once: the last bit of a float32 logarithm is seen by Fourier embeddings (2e-4 of the loss)."""
    return s.double().log().to(s.dtype) if isinstance(s, Tensor) else log(s)


PRECONDITIONERS = {"edm": EDM, "vp": VP, "ve": VE, "iddpm": IDDPM}
