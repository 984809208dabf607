"""Which steps t a training batch sees, and which steps a sampler visits."""

import re

import numpy as np
import torch
from torch import Tensor

from functions.chain import nearest_time, sigma


def training_timesteps(batch_size: int, num_timesteps: int, generator: torch.Generator | None = None) -> Tensor:
    """Antithetic steps (DDIM): u uniform on {0..T-1}, then T-1-u, cut to the batch.

    Returns:
        long (batch_size,), on the generator's device.
    """
    device = generator.device if generator is not None else None
    u = torch.randint(num_timesteps, (batch_size // 2 + 1,), generator=generator, device=device)
    return torch.cat([u, num_timesteps - 1 - u])[:batch_size]


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


def rho_timesteps(schedule, num_steps: int, rho: float = 7.0) -> list[int]:
    """EDM's noise levels (2206.00364, eq. 5), dense at low noise, each snapped to the step nearest in sigma.

        sigma_i = (sigma_min^(1/rho) + i/(S - 1) (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho

    Returns:
        Ascending, from 0 to T-1; fewer than ``num_steps`` where several levels have the same nearest step.
    """
    lowest, highest = sigma(schedule, 0) ** (1 / rho), sigma(schedule, schedule.num_timesteps - 1) ** (1 / rho)
    levels = np.linspace(highest, lowest, num_steps) ** rho                 # S = 1 keeps the highest
    return sorted({nearest_time(schedule, float(level)) for level in levels})


def sampling_timesteps(num_timesteps: int, spec: int | str, skip_type: str = "uniform", schedule=None) -> list[int]:
    """The steps of a sampling chain, ascending and distinct.

    Args:
        num_timesteps: T.
        spec: S, the number of steps; or guided-diffusion's respacing: ``"ddimN"`` (a fixed stride that gives N steps)
            or ``"10,15,20"`` (so many steps in each equal section of the chain, ending at T-1).
        skip_type: uniform, quad, leading, linspace, trailing, respace or edm; ``quad`` and ``edm`` may give fewer
            than S.
        schedule: NoiseSchedule, which ``edm`` needs (see ``rho_timesteps``).

    Raises:
        ValueError: S outside [1, T], an unknown skip type, or a respacing that does not exist.
    """
    T, text = num_timesteps, str(spec).strip()
    spacings = SKIP_TYPES if schedule is None else SKIP_TYPES | {"edm": lambda T, S: rho_timesteps(schedule, S)}
    if skip_type not in spacings:
        raise ValueError(f"skip type {skip_type!r} is unknown; known: {', '.join(sorted(spacings))}")
    if re.fullmatch(r"ddim\d+", text):
        return _fixed_stride(T, int(text[4:]))
    if re.fullmatch(r"\d+(,\d+)+", text):
        return _sections(T, [int(count) for count in text.split(",")])
    if not re.fullmatch(r"\d+", text) or not 1 <= int(text) <= T:
        raise ValueError(f"timesteps {text!r} is not possible; give 1 to {T}, ddimN, or a list such as 10,15,20")
    return sorted({int(t) for t in spacings[skip_type](T, int(text))})


def _fixed_stride(T: int, count: int) -> list[int]:
    for stride in range(1, T + 1):
        if len(range(0, T, stride)) == count:
            return list(range(0, T, stride))
    raise ValueError(f"timesteps ddim{count}: no integer stride gives {count} of {T} steps")


def _sections(T: int, counts: list[int]) -> list[int]:
    """Evenly spaced steps in each of len(counts) sections of nearly equal size, first and last included."""
    steps, start = [], 0
    for index, count in enumerate(counts):
        size = T // len(counts) + (index < T % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"timesteps: section {index + 1} of {len(counts)} has {size} steps, cannot give {count}")
        stride = (size - 1) / (count - 1) if count > 1 else 1
        steps += [start + round(i * stride) for i in range(count)]
        start += size
    return steps
