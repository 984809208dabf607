"""Which times a training batch sees, and which times a sampler visits."""

import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from functions.levels import LEVELS, RANGES, lognormal_sigma, spaced_levels, ve_training_sigma, vp_training_sigma
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
    return schedule.time(lognormal_sigma(_normal(batch_size, generator), mean, std))


def vp_times(schedule, batch_size: int, generator=None, **constants: float) -> Tensor:
    """The levels of uniform times of the variance preserving process, down to 1e-5: EDM, table 1."""
    return schedule.time(vp_training_sigma(_unit(batch_size, generator).float(), **constants))


def ve_times(schedule, batch_size: int, generator=None, **limits: float) -> Tensor:
    """Levels with a uniform logarithm: EDM, table 1."""
    return schedule.time(ve_training_sigma(_unit(batch_size, generator).float(), **limits))


def logit_normal_times(schedule, batch_size: int, generator=None, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Ranks whose logit is normal: more draws in the middle of a flow (2403.03206, section 3.1)."""
    return schedule.at(torch.sigmoid(mean + std * _normal(batch_size, generator).double()))


def beta_times(schedule, batch_size: int, generator=None) -> Tensor:
    """1 - rank ~ Beta(2, 1): more draws near the image (MixFlow, 2512.19311)."""
    return schedule.at(1 - _unit(batch_size, generator).sqrt())


# (schedule, batch size, generator) -> times (B,) on the generator's device; some take constants beside.
TIME_SAMPLERS: dict[str, Callable] = {"antithetic": antithetic_times, "uniform": uniform_times,
                                      "lognormal": lognormal_times, "vp": vp_times, "ve": ve_times,
                                      "logit_normal": logit_normal_times, "beta": beta_times}

# Their constants: name there -> (section, key) of the configuration.
CONSTANTS = {
    "lognormal": {"mean": ("training", "time_mean"), "std": ("training", "time_std")},
    "logit_normal": {"mean": ("training", "time_mean"), "std": ("training", "time_std")},
    "vp": {"beta_d": ("diffusion", "beta_d"), "beta_min": ("diffusion", "beta_min")},
    "ve": {"sigma_min": ("diffusion", "sigma_min"), "sigma_max": ("diffusion", "sigma_max")},
}


class TimeSampler:
    """Draws the times of a training batch. Samplers that learn from the losses share this interface.

    Args:
        schedule: Schedule.
        name: In ``TIME_SAMPLERS``.
        options: Constants of the sampler, such as ``mean`` and ``std``.
    """

    learns = False                          # whether ``update`` wants the losses of every step

    def __init__(self, schedule, name: str = "antithetic", **options: float):
        self.schedule, self.sampler, self.options = schedule, TIME_SAMPLERS[name], options

    @classmethod
    def of(cls, config, schedule, device="cpu") -> "TimeSampler | LossSecondMoment":
        """As the configuration's ``training`` section has it; ``device`` is where one that learns keeps the losses."""
        name = config.training.time_sampler
        if name == "loss_second_moment":
            return LossSecondMoment(schedule.num_timesteps, device=device)
        given = {constant: getattr(getattr(config, section), key)
                 for constant, (section, key) in CONSTANTS.get(name, {}).items()}
        return cls(schedule, name, **{key: value for key, value in given.items() if value is not None})

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


def level_times(schedule, num_steps: int, spacing: str = "edm", prediction=None, sigma_min: float | None = None,
                sigma_max: float | None = None, rho: float | None = None) -> list:
    """The times at the levels of one of EDM's spacings, ``functions.levels.LEVELS``.

    A discrete schedule has the nearest step for each, and fewer than ``num_steps`` where several share theirs.

    Args:
        prediction: Its range, if it has one, limits the levels of a continuous schedule, and its ``round`` moves each
            to one that the network knows.
        sigma_min, sigma_max: Default: the schedule's range for edm, else the spacing's own.
        rho: Of edm; default: the schedule's, else 7.
    """
    levels = spaced_levels(num_steps, spacing, *chain_range(schedule, spacing, prediction, sigma_min, sigma_max),
                           rho=rho or getattr(schedule, "rho", 7.0), rounded=prediction.round if prediction else float)
    return sorted({schedule.time(level) for level in levels})


def chain_range(schedule, spacing: str, prediction=None, sigma_min: float | None = None,
                sigma_max: float | None = None) -> tuple[float, float]:
    """Lowest and highest level of a chain with one of EDM's spacings, see ``level_times``."""
    own = schedule.level_range
    low, high = own if spacing == "edm" else RANGES[spacing]
    limits = own
    if hasattr(prediction, "sigma_min") and not hasattr(schedule, "num_timesteps"):
        limits = prediction.sigma_min, prediction.sigma_max
    return (max(low if sigma_min is None else sigma_min, limits[0]),
            min(high if sigma_max is None else sigma_max, limits[1]))


def _discrete_times(schedule, spec: str, skip_type: str, **levels) -> list[int]:
    T = schedule.num_timesteps
    if re.fullmatch(r"ddim\d+", spec):
        return _fixed_stride(T, int(spec[4:]))
    if re.fullmatch(r"\d+(,\d+)+", spec):
        return _sections(T, [int(count) for count in spec.split(",")])
    if not re.fullmatch(r"\d+", spec) or not 1 <= int(spec) <= T:
        raise ValueError(f"timesteps {spec!r} is not possible; give 1 to {T}, ddimN, or a list such as 10,15,20, which "
                         "counts the steps of equal sections of the chain")
    if skip_type in LEVELS:
        return level_times(schedule, int(spec), skip_type, **levels)
    times = sorted({int(t) for t in SKIP_TYPES[skip_type](T, int(spec))})
    if skip_type != "leading" or not schedule.steps_offset:
        return times
    if times[-1] + schedule.steps_offset >= T:
        raise ValueError(f"timesteps {spec} with diffusion.steps_offset {schedule.steps_offset} would end at step "
                         f"{times[-1] + schedule.steps_offset}; the last is {T - 1}: give fewer, or another skip type")
    return [t + schedule.steps_offset for t in times]


def _continuous_times(schedule, spec: str, skip_type: str, **levels) -> list[float]:
    if not re.fullmatch(r"\d+", spec) or not 1 <= int(spec) <= 100_000:
        raise ValueError(f"timesteps {spec!r} is not possible; a continuous schedule takes 1 to 100000")
    if skip_type in LEVELS:
        return level_times(schedule, int(spec), skip_type, **levels)
    return CONTINUOUS[skip_type](schedule, int(spec))


def _even_ranks(schedule, num_steps: int) -> list[float]:
    """Evenly spread training times, up to the noisiest."""
    return schedule.at(torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps).tolist()


CONTINUOUS = {"uniform": _even_ranks}


def sampling_times(schedule, spec: int | str, skip_type: str | None = None, *, prediction=None,
                   sigma_min: float | None = None, sigma_max: float | None = None, rho: float | None = None) -> list:
    """The times of a sampling chain, ascending and distinct.

    Args:
        schedule: Schedule; integers come back for a discrete one.
        spec: S, the number of steps; or guided-diffusion's respacing of a discrete chain: ``"ddimN"`` (a fixed stride
            that gives N steps) or ``"10,15,20"`` (so many steps in each equal section, ending at T-1).
        skip_type: Discrete: uniform, quad, leading, linspace, trailing or respace; continuous: uniform; both: edm, vp,
            ve or iddpm, see ``level_times``, which like ``quad`` may give fewer than S steps of a discrete chain. None:
            the schedule's own.
        prediction, sigma_min, sigma_max, rho: See ``level_times``.

    Raises:
        ValueError: S outside its range, an unknown skip type, a respacing or a range of levels that does not exist, or
            a range or rho for a skip type that has none.
    """
    discrete = hasattr(schedule, "num_timesteps")
    known = [*(SKIP_TYPES if discrete else CONTINUOUS), *LEVELS]
    skip_type = skip_type or schedule.skip_type
    if skip_type not in known:
        raise ValueError(f"skip_type {skip_type!r} is unknown for this schedule; known: {', '.join(sorted(known))}")
    levels = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
    for key, value in levels.items():
        if value is not None and skip_type not in (LEVELS if key != "rho" else ("edm",)):
            raise ValueError(f"{key} is for --skip_type {' and '.join(sorted(LEVELS)) if key != 'rho' else 'edm'}, "
                             f"not for {skip_type}")
    make = _discrete_times if discrete else _continuous_times
    return make(schedule, str(spec).strip(), skip_type, prediction=prediction, **levels)


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
