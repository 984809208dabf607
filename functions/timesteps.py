"""Which times a training batch sees, and which times a sampler visits."""

import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from functions.loss_history import LossSecondMoment

# ------------------------------------------------------------------------------------------- of a training batch


def _unit(count: int, generator) -> Tensor:
    """Uniform draws in [0, 1), float64 so that no step of a long chain is favoured, (count,)."""
    device = generator.device if generator is not None else None
    return torch.rand(count, generator=generator, dtype=torch.float64, device=device)


def _normal(count: int, generator) -> Tensor:
    device = generator.device if generator is not None else None
    return torch.randn(count, generator=generator, device=device)


def antithetic_times(schedule, batch_size: int, generator=None) -> Tensor:
    """Pairs of ranks u and 1 - u, cut to the batch (DDIM's draw: t and T-1-t)."""
    u = _unit(batch_size // 2 + 1, generator)
    return schedule.at(torch.cat([u, 1 - u])[:batch_size])


def uniform_times(schedule, batch_size: int, generator=None) -> Tensor:
    """Independent draws."""
    return schedule.at(_unit(batch_size, generator))


def lognormal_times(schedule, batch_size: int, generator=None, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """ln level ~ N(mean, std^2): EDM (2206.00364), table 1. On a discrete schedule the nearest steps."""
    return schedule.time((mean + std * _normal(batch_size, generator)).exp())


def logit_normal_times(schedule, batch_size: int, generator=None, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Ranks whose logit is normal: more draws in the middle of a flow (2403.03206, section 3.1)."""
    return schedule.at(torch.sigmoid(mean + std * _normal(batch_size, generator).double()))


# (schedule, batch size, generator) -> times (B,) on the generator's device; the last two also take mean and std.
TIME_SAMPLERS: dict[str, Callable] = {"antithetic": antithetic_times, "uniform": uniform_times,
                                      "lognormal": lognormal_times, "logit_normal": logit_normal_times}

class TimeSampler:
    """Draws the times of a training batch. Samplers that learn from the losses share this interface.

    Args:
        schedule: Schedule.
        name: In ``TIME_SAMPLERS``.
        options: ``mean`` and ``std``, where the sampler takes them.
    """

    learns = False                          # whether ``update`` wants the losses of every step

    def __init__(self, schedule, name: str = "antithetic", **options: float):
        self.schedule, self.sampler, self.options = schedule, TIME_SAMPLERS[name], options

    @classmethod
    def of(cls, config, schedule, device="cpu") -> "TimeSampler | LossSecondMoment":
        """As the configuration's ``training`` section has it; ``device`` is where one that learns keeps the losses."""
        training = config.training
        if training.time_sampler == "loss_second_moment":
            return LossSecondMoment(schedule.num_timesteps, device=device)
        given = {"mean": training.time_mean, "std": training.time_std}
        return cls(schedule, training.time_sampler, **{key: value for key, value in given.items() if value is not None})

    def draw(self, batch_size: int, generator) -> tuple[Tensor, Tensor | None]:
        """Times (B,) on the generator's device, and the importance of each, (B,) or None where all are 1."""
        return self.sampler(self.schedule, batch_size, generator, **self.options), None

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learn from the unweighted losses of a global batch, shard after shard, (B,) each: nothing here."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


# ----------------------------------------------------------------------------------------------------- of a sampler


def _quad(T, S):
    return (np.linspace(0, np.sqrt(0.8 * T), S) ** 2).astype(int)           # DDIM; repeats from S = 30 at T = 1000


SKIP_TYPES = {
    "uniform": lambda T, S: np.arange(S) * T // S,                          # DDIM's range(0, T, T // S) when S | T
    "quad": _quad,
    "leading": lambda T, S: np.arange(S) * (T // S),                        # these three as diffusers spaces them
    "linspace": lambda T, S: np.linspace(0, T - 1, S).round().astype(int),
    "trailing": lambda T, S: np.round(T - np.arange(S)[::-1] * T / S).astype(int) - 1,
    "respace": lambda T, S: _sections(T, [S]),
}


def rho_levels(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> list[float]:
    """EDM's noise levels (2206.00364, eq. 5), dense at low noise, ascending; one step is the highest.

        sigma_i = (sigma_min^(1/rho) + i/(S - 1) (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho
    """
    levels = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps) ** rho
    return levels[::-1].tolist()


def rho_times(schedule, num_steps: int) -> list:
    """The times at EDM's levels between the lowest and the highest level of the schedule.

    A discrete schedule has the nearest step for each, and fewer than ``num_steps`` where several share theirs.
    """
    low, high = schedule.level_range
    rho = getattr(schedule, "rho", 7.0)
    return sorted({schedule.time(level) for level in rho_levels(num_steps, low, high, rho)})


def _discrete_times(schedule, spec: str, skip_type: str) -> list[int]:
    T = schedule.num_timesteps
    if re.fullmatch(r"ddim\d+", spec):
        return _fixed_stride(T, int(spec[4:]))
    if re.fullmatch(r"\d+(,\d+)+", spec):
        return _sections(T, [int(count) for count in spec.split(",")])
    if not re.fullmatch(r"\d+", spec) or not 1 <= int(spec) <= T:
        raise ValueError(f"timesteps {spec!r} is not possible; give 1 to {T}, ddimN, or a list such as 10,15,20, which "
                         "counts the steps of equal sections of the chain")
    if skip_type == "edm":
        return rho_times(schedule, int(spec))
    return sorted({int(t) for t in SKIP_TYPES[skip_type](T, int(spec))})


def _continuous_times(schedule, spec: str, skip_type: str) -> list[float]:
    if not re.fullmatch(r"\d+", spec) or not 1 <= int(spec) <= 100_000:
        raise ValueError(f"timesteps {spec!r} is not possible; a continuous schedule takes 1 to 100000")
    return CONTINUOUS[skip_type](schedule, int(spec))


def _even_ranks(schedule, num_steps: int) -> list[float]:
    """Evenly spread training times, up to the noisiest."""
    return schedule.at(torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps).tolist()


CONTINUOUS = {"edm": rho_times, "uniform": _even_ranks}


def sampling_times(schedule, spec: int | str, skip_type: str | None = None) -> list:
    """The times of a sampling chain, ascending and distinct.

    Args:
        schedule: Schedule; integers come back for a discrete one.
        spec: S, the number of steps; or guided-diffusion's respacing of a discrete chain: ``"ddimN"`` (a fixed stride
            that gives N steps) or ``"10,15,20"`` (so many steps in each equal section, ending at T-1).
        skip_type: Discrete: uniform, quad, leading, linspace, trailing, respace or edm; ``quad`` and ``edm`` may give
            fewer than S. Continuous: uniform or edm. None: the schedule's own.

    Raises:
        ValueError: S outside its range, an unknown skip type, or a respacing that does not exist.
    """
    discrete = hasattr(schedule, "num_timesteps")
    known = [*SKIP_TYPES, "edm"] if discrete else list(CONTINUOUS)
    skip_type = skip_type or schedule.skip_type
    if skip_type not in known:
        raise ValueError(f"skip type {skip_type!r} is unknown for this schedule; known: {', '.join(sorted(known))}")
    return (_discrete_times if discrete else _continuous_times)(schedule, str(spec).strip(), skip_type)


def _fixed_stride(T: int, count: int) -> list[int]:
    for stride in range(1, T):
        if len(range(0, T, stride)) == count:
            return list(range(0, T, stride))
    raise ValueError(f"timesteps ddim{count}: no integer stride gives {count} of {T} steps")


def _sections(T: int, counts: list[int]) -> list[int]:
    """Evenly spaced steps in each of len(counts) sections of nearly equal size, first and last included.

    Positions are a running sum in float64, rounded half to even, as guided-diffusion forms them: i * stride would
    round differently for more than a quarter of all counts.
    """
    steps, start = [], 0
    for index, count in enumerate(counts):
        size = T // len(counts) + (index < T % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"timesteps: section {index + 1} of {len(counts)} has {size} steps, cannot give {count}")
        stride = (size - 1) / (count - 1) if count > 1 else 1
        position = 0.0
        for _ in range(count):
            steps.append(start + round(position))
            position += stride
        start += size
    return steps
