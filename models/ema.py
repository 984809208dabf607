"""Exponential moving average of the weights, mu-weighted at every optimizer step.

    ema_0 = theta_0,    ema_n = mu_n ema_{n-1} + (1 - mu_n) theta_n,    mu_n = mu  or  min(mu, (1 + n) / (10 + n))
"""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """A copy of the model that follows its parameters; buffers are copied once and never averaged.

    The arithmetic is swa_utils' foreach kernel. Its AveragedModel wrapper counts its updates in a tensor, and moving
    that count to the GPU would make the host wait for the GPU at every step; here it is an int.

    Attributes:
        module: The averaged network, in eval mode and without gradients.
        updates: Number n of updates so far; needed beside ``state_dict()`` to resume exactly.
    """

    def __init__(self, model: nn.Module, rate: float, warmup: bool = False):
        self.module = deepcopy(model).requires_grad_(False).eval()
        self.rate, self.warmup = rate, warmup
        self.updates = 0

    @property
    def decay(self) -> float:
        """mu_n of the latest update."""
        n = self.updates
        return min(self.rate, (1 + n) / (10 + n)) if self.warmup else self.rate

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Average the weights of ``model`` in; call once after each optimizer step. Wrapped models (DDP) are fine."""
        self.updates += 1
        average = get_ema_multi_avg_fn(self.decay)
        average(list(self.module.parameters()), list(model.parameters()), self.updates)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the model's own names."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Tensor], updates: int = 0) -> None:
        """Continue from ``state_dict()`` and ``updates`` of another run.

        Raises:
            RuntimeError: Names or shapes differ from the model's.
        """
        self.module.load_state_dict(state)
        self.updates = updates


def make_ema(model: nn.Module, rate: float, warmup: bool = False) -> EMA:
    """An average that starts as a copy of ``model`` (neither wrapped nor compiled), on its device.

    Args:
        rate: mu, in [0, 1).
        warmup: Follow faster at first: min(mu, (1 + n) / (10 + n)) at update n = 1, 2, ...
    """
    return EMA(model, rate, warmup)
