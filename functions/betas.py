"""Betas of DDPM's chain (2006.11239), by the names that the programs of the field give them."""

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


def _adm_linear(start, end, T):
    """guided-diffusion's: DDPM's 1e-4 to 0.02, scaled so that the end of a chain of any length is the same noise."""
    return torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64)


BETAS = {"linear": _linear, "quad": _quad, "const": _const, "jsd": _jsd, "sigmoid": _sigmoid, "cosine": _cosine,
         "adm_linear": _adm_linear, "scaled_linear": _quad}                 # the last is diffusers' name for quad


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas whose last step is pure noise: sqrt(abar) shifted and scaled to end at 0 (Lin et al., 2305.08891)."""
    root = torch.cumprod(1 - betas, 0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    abar = root**2
    return 1 - abar / torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])


def make_betas(diffusion) -> Tensor:
    """beta_0 .. beta_{T-1} of a ``diffusion`` section, float64 (T,)."""
    if diffusion.betas is not None:
        betas = torch.tensor(diffusion.betas, dtype=torch.float64)
    else:
        make = BETAS[diffusion.beta_schedule]
        betas = make(diffusion.beta_start, diffusion.beta_end, diffusion.num_diffusion_timesteps)
    return zero_terminal_snr(betas) if diffusion.zero_terminal_snr else betas
