"""Moving averages of the weights, after every optimizer step.

    ema_0 = theta_0,    ema_n = beta_n ema_{n-1} + (1 - beta_n) theta_n

    rate        beta_n = mu, or min(mu, (1 + n) / (10 + n)) with warm-up
    half-life   beta_n = 0.5^(batch / h),  h = min(half_life, ramp_up * images seen before the step)        (2206.00364)
    length      beta_n = (1 - 1/n)^(gamma + 1): the average over a power-function profile whose relative
                standard deviation is ``length``                                             (2312.02696, eq. 123 - 126)
"""

from collections.abc import Callable, Sequence
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.trained import load_trained, trained_names


class EMA:
    """A copy of the model that follows its parameters; buffers are copied once and never averaged.

    Frozen parameters, which adapters leave as they are, are shared with the model.

    The arithmetic is swa_utils' foreach kernel. Its AveragedModel wrapper counts its updates in a tensor, and moving
    that count to the GPU would make the host wait for the GPU at every step; here it is an int.

    Args:
        model: Neither wrapped nor compiled.
        decay: beta_n for update n = 1, 2, ...

    Attributes:
        module: The averaged network, in eval mode and without gradients.
        updates: Number n of updates so far; needed beside ``state_dict()`` to resume exactly.
    """

    def __init__(self, model: nn.Module, decay: Callable[[int], float]):
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        self.names = trained_names(model)
        self.module = deepcopy(model, {id(parameter): parameter for parameter in frozen})
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.module.requires_grad_(False).eval()
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Average the weights of ``model`` in; call once after each optimizer step. Wrapped models (DDP) are fine."""
        self.updates += 1
        average = get_ema_multi_avg_fn(self.decay(self.updates))
        average(self.parameters, [each for each in model.parameters() if each.requires_grad], self.updates)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the model's own names; of a model with adapters these alone."""
        return {name: tensor for name, tensor in self.module.state_dict().items() if name in self.names}

    def load_state_dict(self, state: dict[str, Tensor], updates: int = 0) -> None:
        """Continue from ``state_dict()`` and ``updates`` of another run.

        Raises:
            RuntimeError: Names or shapes differ from the model's.
        """
        load_trained(self.module, state, self.names)
        self.updates = updates


def _rate(average, batch: int) -> Callable[[int], float]:
    return lambda n: min(average.rate, (1 + n) / (10 + n)) if average.warmup else average.rate


def _half_life(average, batch: int) -> Callable[[int], float]:
    def decay(n: int) -> float:
        seen = (n - 1) * batch
        images = min(average.half_life, average.ramp_up * seen) if average.ramp_up else average.half_life
        return 0.5 ** (batch / max(images, 1e-8))
    return decay


def _length(average, batch: int) -> Callable[[int], float]:
    exponent = profile_exponent(average.length) + 1
    return lambda n: (1 - 1 / n) ** exponent


KINDS = {"rate": _rate, "half_life": _half_life, "length": _length}


def decay_of(average, batch: int) -> Callable[[int], float]:
    """beta_n of an ``Average`` of the configuration, for a global batch of ``batch`` images."""
    kind = next(name for name in KINDS if getattr(average, name) is not None)
    return KINDS[kind](average, batch)


def first_share(decay: Callable[[int], float], updates: int, enough: float = 0.0) -> float:
    """What the weights before the first update still count after ``updates``: prod of beta_n, at most ``enough`` where
    it is no more than that."""
    share = 1.0
    for n in range(1, updates + 1):
        share *= decay(n)
        if share <= enough:
            break
    return share


# ------------------------------------------------------------------------------------- averages chosen after training


def profile_exponent(length: float) -> float:
    """gamma of the profile t^gamma with this relative standard deviation (EDM2, eq. 126), length in (0, 0.289)."""
    squared = length**-2
    roots = np.roots([1, 7, 16 - squared, 12 - squared])
    return float(roots[np.abs(roots.imag) < 1e-9].real.max())


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Inner product of two profiles (time, gamma) (EDM2, algorithm 3)."""
    (ta, ga), (tb, gb) = a, b
    power = gb if ta < tb else -ga
    return (ga + 1) * (gb + 1) * (ta / tb) ** power / ((ga + gb + 1) * max(ta, tb))


def combination(stored: Sequence[tuple[float, float]], wanted: tuple[float, float]) -> np.ndarray:
    """Coefficients with which stored averages best make up another (EDM2, section 3.2); their sum is 1.

    Args:
        stored: (time, length) of each stored average; times are steps or images of the whole run.
        wanted: (time, length) of the one to be made.
    """
    profiles = [(time, profile_exponent(length)) for time, length in stored]
    target = wanted[0], profile_exponent(wanted[1])
    matrix = np.array([[_overlap(a, b) for b in profiles] for a in profiles])
    found = np.linalg.solve(matrix, np.array([_overlap(a, target) for a in profiles]))
    return found / found.sum()


def combine(states: Sequence[dict[str, Tensor]], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sum of state dicts in float64, in the type of the first; buffers alike in all come out alike."""
    return {name: sum(float(c) * state[name].double() for c, state in zip(coefficients, states, strict=True))
            .to(tensor.dtype) for name, tensor in states[0].items()}
