"""A network that has been told all it needs: its schedule, what its output means, and on what it is conditioned.

    denoiser = Denoiser(lambda x, t: ..., schedule)        # any function of x (B, C, H, W) and t (B,) that predicts eps
    x0, eps, _ = denoiser(x, t)
"""

from copy import copy

import torch
from torch import Tensor, nn

from functions.prediction import PREDICTIONS, Estimate, make_prediction
from functions.schedule import make_schedule


class Denoiser:
    """Estimates of x_0 and of the noise, from any network on any schedule.

    Args:
        network: Callable (x, t, **condition) -> F, (N, C or 2C, H, W). x has the type of the network's parameters
            where it is a module, else the type that the denoiser is called with; t is (N,).
        schedule: Schedule.
        prediction: Name in ``PREDICTIONS``, or a Prediction: what F is.
        condition: Tensors that the network takes by name, batch first, such as ``labels`` long (B,), -1 for none.
        time_factor: The network is told its time multiplied by this, as programs that scale their times have it.

    Raises:
        ValueError: An unknown prediction. On a call: output of a shape that does not belong to the input.
    """

    def __init__(self, network, schedule, prediction="epsilon", condition: dict[str, Tensor] | None = None,
                 time_factor: float = 1.0):
        if isinstance(prediction, str) and prediction not in PREDICTIONS:
            raise ValueError(f"prediction {prediction!r} is unknown; known: {', '.join(sorted(PREDICTIONS))}")
        self.network, self.schedule, self.condition, self.time_factor = network, schedule, condition or {}, time_factor
        self.prediction = PREDICTIONS[prediction] if isinstance(prediction, str) else prediction
        self._guide = None                                                  # (by, scale, interval)
        self._watch = None

    @classmethod
    def of(cls, config, network, schedule=None) -> "Denoiser":
        """The network of a configuration with the schedule and the prediction that the configuration names.

        Args:
            network: From ``models.build_model(config)``, or any callable that stands for it.
            schedule: Where it is at hand; default: made from ``config.diffusion``.
        """
        diffusion = config.diffusion
        return cls(network, schedule or make_schedule(diffusion), make_prediction(diffusion),
                   time_factor=TIME_FACTORS[diffusion.schedule](diffusion))

    def told(self, x: Tensor, t) -> tuple[Tensor, Tensor]:
        """What the network gets for x and t: its input, like x, and its times, (N,)."""
        fed, time = self.prediction.feed(self.schedule, x, t)
        if not isinstance(time, Tensor):
            time = torch.full((len(x),), float(time), device=x.device)                       # float32 (N,)
        return fed, time if self.time_factor == 1 else time * self.time_factor

    def raw(self, x: Tensor, t) -> Tensor:
        """The network's output, in the type of x.

        Args:
            x: (N, C, H, W) with N a multiple of the condition's batch B, whose rows are then repeated: K-major.
            t: A number for all, or (N,).
        """
        fed, time = self.told(x, t)
        if isinstance(self.network, nn.Module):
            fed = fed.to(next(self.network.parameters()).dtype)
        condition = {name: rows if len(rows) == len(x) else rows.repeat(len(x) // len(rows), *[1] * (rows.ndim - 1))
                     for name, rows in self.condition.items()}
        out = self.network(fed, time, **condition)
        n, c, h, w = x.shape
        if tuple(out.shape) not in ((n, c, h, w), (n, 2 * c, h, w)):
            raise ValueError(f"the network gives {tuple(out.shape)} for an input of {tuple(x.shape)}; it must give "
                             f"{(n, c, h, w)}, or {(n, 2 * c, h, w)} with learned variances")
        return out.to(x.dtype)

    def __call__(self, x: Tensor, t) -> Estimate:
        """Estimates at x (B, C, H, W) and t, a number for all or (B,); (B, C, H, W) each, in the type of x."""
        own = self.prediction.read(self.schedule, x, t, self.raw(x, t))
        estimate = own if self._guide is None else self._guided(own, x, t)
        if self._watch is not None:
            self._watch(t, estimate)
        return estimate

    def _guided(self, own: Estimate, x: Tensor, t) -> Estimate:
        by, scale, interval = self._guide
        low, high = interval or (0.0, float("inf"))
        level = self.schedule.level(t, x.dtype)
        inside = (low < level) & (level <= high) if isinstance(level, Tensor) else low < level <= high
        if scale == 1 or not isinstance(inside, Tensor) and not inside:
            return own
        other = by(x, t)
        x0, eps = other.x0 + scale * (own.x0 - other.x0), other.eps + scale * (own.eps - other.eps)
        if isinstance(inside, Tensor):
            x0, eps = torch.where(inside, x0, own.x0), torch.where(inside, eps, own.eps)
        return Estimate(x0, eps, own.variance)

    def given(self, condition: dict[str, Tensor]) -> "Denoiser":
        """The same network under (also) this condition."""
        other = copy(self)
        other.condition = {**self.condition, **condition}
        return other

    def watched(self, callback) -> "Denoiser":
        """The same denoiser, which shows ``callback(t, estimate)`` every estimate that it gives."""
        other = copy(self)
        other._watch = callback
        return other

    def calling(self, network) -> "Denoiser":
        """The same with another network, which takes and gives what this one does."""
        other = copy(self)
        other.network = network
        return other

    def guided(self, by: "Denoiser", scale: float, interval: tuple[float, float] | None = None) -> "Denoiser":
        """by + scale (self - by), for x0 and eps each.

        Classifier-free guidance (2207.12598) where ``by`` is the network without the condition, autoguidance
        (2406.02507) where it is a worse one.

        Args:
            scale: 1 is this denoiser itself, to the bit.
            interval: Levels (low, high] inside which it guides (2404.07724); none: everywhere.
        """
        other = copy(self)
        other._guide = (by, scale, interval)
        return other


# What the network is told for a time of its schedule: DDPM's steps as they are, or as if there were 1,000 of them; a
# flow's times in [0, 1] likewise, since the sinusoids of all networks are made for hundreds.
TIME_FACTORS = {
    "discrete": lambda diffusion: 1000 / diffusion.num_steps if diffusion.rescale_timesteps else 1.0,
    "sigma": lambda diffusion: 1.0,
    "flow": lambda diffusion: 1000.0,
}
