"""Where in an image its power lies: the bands of a one-level Haar transform, and rings of equal frequency."""

import torch
from torch import Tensor

BANDS = ("ll", "lh", "hl", "hh")


def haar(x: Tensor) -> dict[str, Tensor]:
    """The orthonormal transform: low in both directions (ll), high along a row (lh), along a column (hl), in both (hh).

    Args:
        x: (B, C, H, W); of odd sides the last row or column is left out.

    Returns:
        (B, C, H // 2, W // 2) for each of ``BANDS``.
    """
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    a, b, c, d = (x[..., i:height:2, j:width:2] for i in (0, 1) for j in (0, 1))
    return dict(zip(BANDS, ((a + b + c + d) / 2, (a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2),
                    strict=True))


def radial_power(x: Tensor) -> Tensor:
    """Mean power over rings of whole radius in the Fourier plane, 0 to half the shorter side; of white noise 1.

    Args:
        x: (B, C, H, W).

    Returns:
        (B, R) with R = min(H, W) // 2 + 1: radius r stands for r periods over the shorter side.
    """
    _, _, height, width = x.shape
    side = min(height, width)
    power = torch.fft.fft2(x.double(), norm="ortho").abs().square().mean(1)                    # (B, H, W)
    radius = torch.hypot(torch.fft.fftfreq(height, dtype=torch.float64)[:, None],
                         torch.fft.fftfreq(width, dtype=torch.float64)) * side                 # (H, W)
    ring = radius.round().long().flatten().to(x.device)
    counts = torch.bincount(ring, minlength=side // 2 + 1).double()
    sums = torch.zeros(len(x), len(counts), dtype=torch.float64, device=x.device)
    sums.index_add_(1, ring, power.flatten(1))
    return (sums / counts.clamp(min=1))[:, :side // 2 + 1]
