"""The schedules: DDPM's chain of steps, EDM's levels, and rectified flow. Notation: ``functions.schedule_base``, and

    abar_t   = prod_{s<=t} (1 - beta_s)                DDPM (2006.11239), section 2; abar_{-1} = 1
"""

from bisect import bisect_left
from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from functions.betas import make_betas
from functions.levels import RANGES
from functions.prediction import make_prediction
from functions.schedule_base import Schedule
from functions.timesteps import sampling_times
from utils.errors import ConfigError


class DiscreteSchedule(Schedule):
    """DDPM's chain: alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t) at t = 0..T-1; -1 is the image.

    Args:
        betas: beta_0 .. beta_{T-1}, any 1-D sequence; 0 < beta < 1, the last may be 1.
        network_times: What the network is told for each t; default: t. A respaced chain knows its original steps.
        set_alpha_to_one: False ends the chain at abar_0 instead of 1, as diffusers' scheduler files may ask.
        steps_offset: Added to every step of the spacing ``leading``, likewise.

    Raises:
        ValueError: Not 1-D, empty, a beta outside its range, or so large ones that float64 holds no abar.
    """

    end = -1

    def __init__(self, betas, network_times: Sequence[int] | None = None, set_alpha_to_one: bool = True,
                 steps_offset: int = 0):
        betas = torch.as_tensor(betas, dtype=torch.float64).cpu()
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas must be a non-empty 1-D sequence, given shape {tuple(betas.shape)}")
        if not (betas > 0).all() or not (betas[:-1] < 1).all() or betas[-1] > 1:
            raise ValueError(f"betas must lie in (0, 1), 1 only in last place; given {betas.min()} to {betas.max()}")
        self.num_timesteps, self.steps_offset, self.betas = len(betas), steps_offset, betas.tolist()
        self.start = self.num_timesteps - 1
        abar = torch.cumprod(1 - betas, 0)
        if ((abar == 0) & (betas < 1)).any():
            raise ValueError(f"betas up to {betas.max():.3g} leave nothing of an image after {int((abar > 0).sum())} "
                             f"of {len(betas)} steps; give smaller ones, or fewer steps")
        first = torch.ones(1, dtype=torch.float64) if set_alpha_to_one else abar[:1]
        abar = torch.cat([first, abar])                                     # (T + 1,), index t + 1
        self._numbers = {"alpha": abar.sqrt().tolist(), "sigma": (1 - abar).sqrt().tolist()}
        self._numbers["level"] = [self.level(t) for t in range(self.num_timesteps)]
        self._numbers["network_time"] = list(range(self.num_timesteps) if network_times is None else network_times)
        self._tables = {}

    def alpha(self, t, dtype=torch.float32):
        return self._coefficient("alpha", t, dtype)

    def sigma(self, t, dtype=torch.float32):
        return self._coefficient("sigma", t, dtype)

    def _coefficient(self, name: str, t, dtype):
        if isinstance(t, Tensor):
            return self._table(name, t.device, dtype)[t.long() + 1].view(-1, 1, 1, 1)
        return self._numbers[name][int(t) + 1]

    def _table(self, name: str, device, dtype) -> Tensor:
        """The numbers of that name on a device, to which they go once: copying them again would wait for it."""
        key = name, device, dtype
        if key not in self._tables:
            self._tables[key] = torch.tensor(self._numbers[name], dtype=torch.float64).to(device, dtype)
        return self._tables[key]

    def time(self, level):
        """The step whose level is nearest."""
        if isinstance(level, Tensor):
            levels, level = self._table("level", level.device, torch.float64), level.double()
            above = torch.searchsorted(levels, level).clamp(max=self.start)
            below = (above - 1).clamp(min=0)
            return torch.where(level - levels[below] <= levels[above] - level, below, above)
        levels = self._numbers["level"]
        above = min(bisect_left(levels, level), self.start)
        below = max(0, above - 1)
        return below if level - levels[below] <= levels[above] - level else above

    @property
    def level_range(self):
        finite = [level for level in self._numbers["level"] if level < inf]
        return finite[0], finite[-1]

    def network_time(self, t):
        if isinstance(t, Tensor):
            return self._table("network_time", t.device, torch.long)[t.long()]
        return self._numbers["network_time"][int(t)]

    def at(self, u):
        return (u * self.num_timesteps).long().clamp(max=self.start)

    def rank(self, t):
        return t.double() / self.num_timesteps

    def below(self, t, k):
        return (t - k).clamp(min=0), t >= k

    def above(self, t, k):
        return (t + k).clamp(max=self.start)

    def respaced(self, times):
        """Index k stands for ``times[k]``: betas 1 - abar_k/abar_{k-1}, and the network is told ``times[k]``."""
        self.check_times(times)
        abar = [1.0, *(self.alpha(t) ** 2 for t in times)]
        betas = [1 - below / above for above, below in zip(abar, abar[1:], strict=False)]
        return DiscreteSchedule(betas, [self.network_time(t) for t in times], self.alpha(self.end) == 1,
                                self.steps_offset)

    def check_times(self, times):
        super().check_times(times)
        if times[-1] >= self.num_timesteps or any(t != int(t) for t in times):
            raise ValueError(f"timesteps must be whole numbers in [0, {self.num_timesteps}), given {times[0]} to "
                             f"{times[-1]}")


class SigmaSchedule(Schedule):
    """EDM's (2206.00364): alpha = 1, sigma = t, so that time is the noise level.

    Args:
        sigma_min, sigma_max: Range of the training levels; a chain may visit any level above 0.
        rho: The training levels are evenly spaced in sigma^(1/rho), EDM eq. 5.
        rungs: How many there are, for the sequence-aware loss: neighbours of one another as the steps of DDPM are.

    Raises:
        ValueError: An empty range, or a number out of it.
    """

    end, skip_type = 0.0, "edm"
    state_dtype = torch.float64             # EDM's: x is 80 times the image, of which 0.002 matter at the end

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, rungs: int = 1000):
        if not 0 < sigma_min < sigma_max < inf or not rho > 0 or rungs < 2:
            raise ValueError(f"needs 0 < sigma_min < sigma_max, rho > 0 and at least 2 rungs; given sigma_min "
                             f"{sigma_min}, sigma_max {sigma_max}, rho {rho}, rungs {rungs}")
        self.sigma_min, self.sigma_max, self.rho, self.rungs = sigma_min, sigma_max, rho, rungs
        self.start = sigma_max
        self.low, self.high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)

    def alpha(self, t, dtype=torch.float32):
        return torch.ones(len(t), 1, 1, 1, dtype=dtype, device=t.device) if isinstance(t, Tensor) else 1.0

    def sigma(self, t, dtype=torch.float32):
        return t.to(dtype).view(-1, 1, 1, 1) if isinstance(t, Tensor) else float(t)

    def time(self, level):
        return level

    @property
    def level_range(self):
        return self.sigma_min, self.sigma_max

    def prior_std(self, t):
        return float(t)

    def at(self, u):
        return ((self.low + u * (self.high - self.low)) ** self.rho).float()

    def rank(self, t):
        return ((t.double() ** (1 / self.rho) - self.low) / (self.high - self.low)).clamp(0, 1 - 1e-9)

    def below(self, t, k):
        if k == 0:
            return t, torch.ones_like(t, dtype=torch.bool)
        rung = t.double() ** (1 / self.rho) - k * (self.high - self.low) / (self.rungs - 1)
        return (rung.clamp(min=self.low) ** self.rho).to(t.dtype), rung >= self.low

    def above(self, t, k):
        rung = t.double() ** (1 / self.rho) + k * (self.high - self.low) / (self.rungs - 1)
        return (rung.clamp(max=self.high) ** self.rho).to(t.dtype)


class FlowSchedule(Schedule):
    """Rectified flow (2209.03003, 2210.02747): alpha = 1 - t, sigma = t for t in (0, 1].

    Args:
        shift: Moves training draws and step lists to more noise, t -> shift t / (1 + (shift - 1) t) (2403.03206, eq.
            23); 1 changes nothing.
        rungs: Steps of 1/rungs are neighbours for the sequence-aware loss.

    Raises:
        ValueError: A number out of its range.
    """

    start, end = 1.0, 0.0

    def __init__(self, shift: float = 1.0, rungs: int = 1000):
        if not shift > 0 or rungs < 2:
            raise ValueError(f"needs shift > 0 and at least 2 rungs; given shift {shift}, rungs {rungs}")
        self.shift, self.rungs = shift, rungs

    def alpha(self, t, dtype=torch.float32):
        return (1 - t.double()).to(dtype).view(-1, 1, 1, 1) if isinstance(t, Tensor) else 1.0 - t

    def sigma(self, t, dtype=torch.float32):
        return t.to(dtype).view(-1, 1, 1, 1) if isinstance(t, Tensor) else float(t)

    def time(self, level):
        return level / (1 + level) if isinstance(level, Tensor) or level < inf else 1.0

    @property
    def level_range(self):
        return self.level(1 / self.rungs), self.level(1 - 1 / self.rungs)

    def at(self, u):
        u = u.clamp(min=2**-53)                                             # never the image itself
        return (self.shift * u / (1 + (self.shift - 1) * u)).float()

    def rank(self, t):
        return (t.double() / (self.shift - (self.shift - 1) * t.double())).clamp(0, 1 - 1e-9)

    def below(self, t, k):
        if k == 0:
            return t, torch.ones_like(t, dtype=torch.bool)
        lower = t - k / self.rungs
        return lower.clamp(min=1 / self.rungs), lower >= 1 / self.rungs

    def above(self, t, k):
        return (t + k / self.rungs).clamp(max=1.0)

    def check_times(self, times):
        super().check_times(times)
        if times[-1] > 1:
            raise ValueError(f"times of a flow lie in (0, 1], given {times[0]} to {times[-1]}")


# ------------------------------------------------------------------------------------------------------- configuration


def _discrete(diffusion) -> DiscreteSchedule:
    schedule = DiscreteSchedule(make_betas(diffusion), set_alpha_to_one=diffusion.set_alpha_to_one,
                                steps_offset=diffusion.steps_offset)
    if diffusion.timestep_respacing is None:
        return schedule
    return schedule.respaced(sampling_times(schedule, diffusion.timestep_respacing, "respace"))


def _sigma(diffusion) -> SigmaSchedule:
    """EDM's range, as far as the prediction knows it, unless another is given."""
    prediction, (low, high) = make_prediction(diffusion), RANGES["edm"]
    low = diffusion.sigma_min or max(low, getattr(prediction, "sigma_min", low))
    return SigmaSchedule(low, diffusion.sigma_max or high, diffusion.rho, diffusion.rungs)


SCHEDULES = {"discrete": _discrete, "sigma": _sigma,
             "flow": lambda diffusion: FlowSchedule(diffusion.shift, diffusion.rungs)}


def make_schedule(diffusion) -> Schedule:
    """The schedule of the ``diffusion`` section of a configuration. ConfigError: betas or steps that do not exist."""
    try:
        schedule = SCHEDULES[diffusion.schedule](diffusion)
    except ValueError as error:
        raise ConfigError(f"diffusion: {error}") from None
    schedule.skip_type = diffusion.skip_type or schedule.skip_type
    return schedule
