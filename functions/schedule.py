"""Noise schedules and the forward process q(x_t | x_0).

Notation (DDPM, Ho et al. 2020): T steps, t in {0..T-1}; abar_t = prod_{s<=t} (1 - beta_s), abar_{-1} = 1.
"""

import torch
from torch import Tensor


def _linear(start, end, T):
    return torch.linspace(start, end, T, dtype=torch.float64)


def _quad(start, end, T):
    return torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2


def _const(start, end, T):
    return torch.full((T,), end, dtype=torch.float64)


def _jsd(start, end, T):
    """1/T, 1/(T-1), .., 1; the last is capped so that the chain can be inverted."""
    return (1 / torch.arange(T, 0, -1, dtype=torch.float64)).clamp(max=0.999)


def _sigmoid(start, end, T):
    return torch.sigmoid(torch.linspace(-6, 6, T, dtype=torch.float64)) * (end - start) + start


def _cosine(start, end, T):
    """Nichol & Dhariwal 2021, eq. 17: abar_t = f(t + 1) / f(0)."""
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * torch.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


SCHEDULES = {"linear": _linear, "quad": _quad, "const": _const, "jsd": _jsd, "sigmoid": _sigmoid, "cosine": _cosine}


class NoiseSchedule:
    """abar_t for every t, computed in float64 and handed out in float32.

    Args:
        betas: beta_0 .. beta_{T-1}, any 1-D sequence; 0 < beta < 1, the last may be 1.

    Raises:
        ValueError: Not 1-D, empty, or a beta outside its range.
    """

    def __init__(self, betas):
        betas = torch.as_tensor(betas, dtype=torch.float64).cpu()
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas must be a non-empty 1-D sequence, given shape {tuple(betas.shape)}")
        if not (betas > 0).all() or not (betas[:-1] < 1).all() or betas[-1] > 1:
            raise ValueError(f"betas must lie in (0, 1), 1 only in last place; given {betas.min()} to {betas.max()}")
        self.num_timesteps = len(betas)
        alpha_bars = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, 0)])
        self._exact = alpha_bars.tolist()              # float64; index t + 1, so that t = -1 gives 1
        self._table = alpha_bars.float()               # (T + 1,)

    @classmethod
    def from_config(cls, diffusion) -> "NoiseSchedule":
        """From the ``diffusion`` section of a configuration (beta_schedule, beta_start, beta_end, T)."""
        make_betas = SCHEDULES[diffusion.beta_schedule]
        return cls(make_betas(diffusion.beta_start, diffusion.beta_end, diffusion.num_diffusion_timesteps))

    def to(self, device) -> "NoiseSchedule":
        """Move the table that ``alpha_bar`` reads from; returns self."""
        self._table = self._table.to(device)
        return self

    def alpha_bar(self, t: Tensor | int) -> Tensor:
        """abar_t as float32.

        Args:
            t: Steps in [-1, T): long (B,) on the schedule's device, or an int.

        Returns:
            (B, 1, 1, 1), or (1, 1, 1, 1) for an int.
        """
        index = torch.as_tensor(t, device=self._table.device).reshape(-1) + 1
        return self._table[index].view(-1, 1, 1, 1)

    def exact_alpha_bar(self, t: int) -> float:
        """abar_t in float64, for coefficients such as 1 - abar_i / abar_j that cancel in float32."""
        return self._exact[t + 1]

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Sample q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), DDPM eq. 4.

        Args:
            x0: Clean images in [-1, 1], (B, C, H, W).
            noise: Standard normal draw, same shape.
            t: Steps in [-1, T); -1 returns ``x0`` unchanged, (B,).
        """
        abar = self.alpha_bar(t)                                   # (B, 1, 1, 1)
        return abar.sqrt() * x0 + (1 - abar).sqrt() * noise        # (B, C, H, W)

    def predict_x0(self, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The x_0 that gave ``x_t`` if ``eps`` was the noise: ``add_noise`` solved for x_0 (DDIM eq. 9).

        Args:
            x_t: Noisy images, (B, C, H, W).
            eps: Noise estimate, same shape.
            t: Steps in [-1, T), (B,).
        """
        abar = self.alpha_bar(t)                                   # (B, 1, 1, 1)
        return (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()       # (B, C, H, W)
