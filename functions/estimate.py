"""What every prediction gives, and what all of them share."""

from typing import NamedTuple, Protocol

from torch import Tensor


class Estimate(NamedTuple):
    x0: Tensor                              # (B, C, H, W)
    eps: Tensor                             # (B, C, H, W)
    variance: Tensor | None = None          # learned v = (output + 1)/2 of 2C-channel networks, else None


class Prediction(Protocol):
    perturbation_target: str                # what input perturbation aims at by default, see functions.losses

    def feed(self, schedule, x: Tensor, t) -> tuple[Tensor, Tensor | float]:
        """What the network gets: its input and its time, for t a number or (B,)."""

    def read(self, schedule, x: Tensor, t, raw: Tensor) -> Estimate:
        """The estimate that F stands for; ``raw`` (B, C or 2C, H, W)."""

    def target(self, schedule, x0: Tensor, eps: Tensor, t) -> Tensor:
        """The F that means this x0 and this eps."""

    def round(self, level: float) -> float:
        """The level that the network knows which is nearest to ``level``."""


def coefficients(schedule, t, like: Tensor):
    """(alpha, sigma) at t: floats for a number, else (B, 1, 1, 1) in the type of ``like``."""
    return schedule.alpha(t, like.dtype), schedule.sigma(t, like.dtype)


def refuse_zero(alpha) -> None:
    if not isinstance(alpha, Tensor) and alpha == 0:
        raise ValueError("the chain starts from pure noise (alpha 0), from which a prediction of the noise gives no "
                         "image; use diffusion.prediction v_prediction, or leave out the last step")
