"""The noise levels that EDM's family trains and samples at (Karras et al., 2206.00364, table 1 and appendix C).

Notation: s noise level sigma; S sampling steps; i = 0..S-1 counts from the highest level down, as in the paper. Lists
come out ascending, as samplers here take them.

    edm     s_i = (s_max^(1/rho) + i/(S - 1) (s_min^(1/rho) - s_max^(1/rho)))^rho                              eq. 5
    ve      s_i = s_max (s_min/s_max)^(i/(S - 1))
    vp      s_i = s(1 + i/(S - 1) (epsilon_s - 1)),  s(t) = sqrt(exp(beta_d t^2/2 + beta_min t) - 1)
    iddpm   every so many of the levels u_j of Nichol & Dhariwal's cosine chain
"""

from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from math import expm1, log1p, pi, sqrt

import numpy as np
import torch
from torch import Tensor

BETA_D, BETA_MIN = 19.9, 0.1         # of VP; DDPM's linear betas 1e-4 to 0.02 in continuous time
EPSILON_T = 1e-5                     # the lowest VP time of training
EPSILON_S = 1e-3                     # and of sampling
SIGMA_MIN_VE, SIGMA_MAX_VE = 0.02, 100.0
M, C_1, C_2 = 1000, 0.001, 0.008     # steps of iDDPM's chain, the largest beta's complement, the cosine's offset

# ---------------------------------------------------------------------------------------------------------- VP, iDDPM


def vp_sigma(t: Tensor, beta_d: float = BETA_D, beta_min: float = BETA_MIN) -> Tensor:
    """s(t) at t in [0, 1], in the type of t."""
    return torch.expm1(0.5 * beta_d * t**2 + beta_min * t).sqrt()


def vp_time(sigma: Tensor, beta_d: float = BETA_D, beta_min: float = BETA_MIN) -> Tensor:
    """The t of s(t). In float32 its last bits are seen by published networks, so the order of operations is theirs."""
    return ((beta_min**2 + 2 * beta_d * (1 + sigma**2).log()).sqrt() - beta_min) / beta_d


def vp_betas(sigma_min: float, sigma_max: float, epsilon_s: float = EPSILON_S) -> tuple[float, float]:
    """The (beta_d, beta_min) whose levels run from ``sigma_min`` at epsilon_s to ``sigma_max`` at 1.

    Raises:
        ValueError: There are none: beta_d would be negative.
    """
    low, high = log1p(sigma_min**2), log1p(sigma_max**2)
    if low >= epsilon_s * high:
        limit = sqrt(expm1(epsilon_s * high))
        raise ValueError(f"sigma_min {sigma_min:g} is too high for the vp levels up to {sigma_max:g}: it must stay "
                         f"below {limit:.4g}; lower it, or take the edm levels")
    beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
    return beta_d, high - beta_d / 2


@cache
def iddpm_chain(dtype=np.float32, c_1: float = C_1, c_2: float = C_2) -> tuple[float, ...]:
    """u_0 .. u_M, falling from 20291 to 0:  u_M = 0,  u_{j-1} = sqrt((u_j^2 + 1)/max(abar(j-1)/abar(j), C_1) - 1),
    abar(j) = sin^2(pi j/(2 M (1 + C_2))).

    abar is rounded to float32, as in the published programs; networks hold the float32 table, the step list the other.

    Args:
        dtype: NumPy's float32 or float64, in which u is computed.
    """
    angle = torch.arange(M + 1, dtype=torch.float32) * (0.5 * pi) / M / (c_2 + 1)
    ratio = ((angle[:-1].sin()**2) / (angle[1:].sin()**2)).clamp(min=c_1).numpy()
    u = [dtype(0)]
    for value in ratio[::-1]:
        u.append(np.sqrt((u[-1]**2 + dtype(1)) / dtype(value) - dtype(1)))
    return tuple(float(value) for value in u[::-1])


def nearest(levels, level: float) -> float:
    """The member of a falling sequence that is nearest to ``level``."""
    at = bisect_left(levels, -level, key=lambda value: -value)
    return min(levels[max(at - 1, 0):at + 1], key=lambda value: abs(value - level))


# --------------------------------------------------------------------------------------------------------- step lists


def _fractions(num_steps: int) -> np.ndarray:
    return np.linspace(0, 1, num_steps)                                     # i/(S - 1); S = 1: the highest level


def rho_levels(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> list[float]:
    low, high = sigma_min**(1 / rho), sigma_max**(1 / rho)
    return _ascending((high + _fractions(num_steps) * (low - high))**rho)


def ve_levels(num_steps: int, sigma_min: float, sigma_max: float) -> list[float]:
    return _ascending(sigma_max * (sigma_min / sigma_max)**_fractions(num_steps))


def vp_levels(num_steps: int, sigma_min: float, sigma_max: float) -> list[float]:
    """Raises ValueError as ``vp_betas``."""
    times = torch.from_numpy(1 + _fractions(num_steps) * (EPSILON_S - 1))
    return _ascending(vp_sigma(times, *vp_betas(sigma_min, sigma_max)).numpy())


def iddpm_levels(num_steps: int, sigma_min: float, sigma_max: float) -> list[float]:
    """Raises ValueError if the chain has no level in [sigma_min, sigma_max]."""
    inside = [u for u in iddpm_chain(np.float64) if sigma_min <= u <= sigma_max]
    if not inside:
        raise ValueError(f"sigma_min {sigma_min:g} and sigma_max {sigma_max:g}: iDDPM's chain has no level between "
                         "them; widen the range")
    return _ascending(np.array(inside)[np.round((len(inside) - 1) * _fractions(num_steps)).astype(int)])


def _ascending(levels: np.ndarray) -> list[float]:
    return levels[::-1].tolist()


LEVELS: dict[str, Callable] = {"edm": rho_levels, "ve": ve_levels, "vp": vp_levels, "iddpm": iddpm_levels}

# (sigma_min, sigma_max) where nobody says otherwise. The vp range is s(epsilon_s) to s(1).
RANGES = {"edm": (0.002, 80.0), "ve": (0.02, 100.0), "iddpm": (0.002, 81.0),
          "vp": (sqrt(expm1(0.5 * BETA_D * EPSILON_S**2 + BETA_MIN * EPSILON_S)), sqrt(expm1(0.5 * BETA_D + BETA_MIN)))}


def spaced_levels(num_steps: int, spacing: str, sigma_min: float, sigma_max: float, *, rho: float = 7.0,
                  rounded: Callable[[float], float] = float) -> list[float]:
    """The levels of a sampling chain, ascending and distinct; after the lowest comes the image.

    Args:
        num_steps: S, at least 1; 1 gives the highest level. The result is shorter where levels coincide, which those
            of iDDPM can.
        spacing: Name in ``LEVELS``.
        rho: Of ``edm``.
        rounded: From a level to one that the network knows.

    Raises:
        ValueError: An empty range, or one that the spacing cannot have.
    """
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min {sigma_min:g} and sigma_max {sigma_max:g} are no range; the lower must be above 0 "
                         "and below the higher")
    options = {"rho": rho} if spacing == "edm" else {}
    return sorted({rounded(level) for level in LEVELS[spacing](num_steps, sigma_min, sigma_max, **options)})


# ------------------------------------------------------------------------------------------------------ training times
# From standard normal or uniform draws to levels, in the type of the draws.


def lognormal_sigma(normal: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    return (mean + std * normal).exp()


def vp_training_sigma(uniform: Tensor, beta_d: float = BETA_D, beta_min: float = BETA_MIN) -> Tensor:
    return vp_sigma(1 + uniform * (EPSILON_T - 1), beta_d, beta_min)


def ve_training_sigma(uniform: Tensor, sigma_min: float = SIGMA_MIN_VE, sigma_max: float = SIGMA_MAX_VE) -> Tensor:
    return sigma_min * (sigma_max / sigma_min)**uniform
