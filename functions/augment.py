"""EDM's geometric augmentation of training images, of which the network is told (2206.00364, appendix F.2).

Each of six transformations happens with a probability of its own; what happened is the image's label vector, zeros
where nothing did. In sampling the labels are left out, so nothing of this shows in samples.

Notation: N images of H x W pixels, w what was drawn (0 where the transformation does not happen), p its probability.

    name             w                  effect                                        labels
    xflip, yflip     0 or 1             mirror along W, H                             w
    scale            N(0, 1)            enlarge by s = 2^(0.2 w)                      w
    rotate_frac      U(-1, 1)           rotate by theta = pi w                        cos theta - 1, sin theta
    aniso            N(0, 1), and r =   stretch by a = 2^(0.2 w) in direction r,      w cos r, w sin r
                     pi U(-1, 1) or 0   by 1/a across
    translate_frac   N(0, 1) twice      move by w_x W/8, w_y H/8                      w_x, w_y

All but the flips are one resampling. With coordinates in pixels from the centre (x right, y down), the source of the
output pixel q is G q,

    G = diag(1/s, 1/s) R(theta) R(-r) diag(1/a, a) R(r) T(-w_x W/8, -w_y H/8),   R(t) = [[cos, -sin], [sin, cos]]

Shapes depend on nothing that was drawn, and an image does not depend on its batch.
"""

from collections.abc import Callable
from functools import cache
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor

# Probability of each transformation in units of p, in the order in which they draw. As published, xflip is certain.
MULTIPLIERS = {"xflip": 1e8, "yflip": 1.0, "scale": 1.0, "rotate_frac": 1.0, "aniso": 1.0, "translate_frac": 1.0}
LABEL_DIM = 9

SCALE_STD, ANISO_STD, TRANSLATE_STD, DIRECTION_PROBABILITY = 0.2, 0.2, 0.125, 0.5

# The wavelet filter sym6 for images at twice their resolution; sum sqrt(2).
TAPS = (0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
        0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
        0.0017677118642428036, -0.007800708325034148)


class Draws:
    """Random numbers from one generator, on its device."""

    def __init__(self, generator: torch.Generator):
        self.given = {"generator": generator, "device": generator.device}

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, **self.given)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, **self.given)

    def coin(self, *shape: int) -> Tensor:
        return torch.randint(2, shape, **self.given)


def augment(images: Tensor, p: float, draws: Draws,
            multipliers: dict[str, float] = MULTIPLIERS) -> tuple[Tensor, Tensor]:
    """Transformed images and what was done to them.

    Args:
        images: (N, C, H, W) in any range; the result may leave it by overshooting.
        p: Probability of each transformation but xflip, which has 1/2 whenever p > 0; in [0, 1].
        draws: On the images' device.
        multipliers: As ``MULTIPLIERS``; names that are left out do not draw and have no labels.

    Returns:
        (N, C, H, W), and labels (N, 9), float32.
    """
    height, width = images.shape[2:]
    labels, maps = [], []
    for name, multiplier in multipliers.items():
        if name in FLIPS:
            images, label = _flip(images, FLIPS[name], draws, p * multiplier)
        else:
            matrix, label = MAPS[name](draws, len(images), p * multiplier, width, height)
            maps.append(matrix)
        labels += label
    if maps:
        product = maps[0]
        for matrix in maps[1:]:
            product = product @ matrix
        images = resample(images, product)
    return images, torch.stack(labels, dim=1)


# ----------------------------------------------------------------------------------------------------- transformations
# Each draws its values, then the number that decides whether it happens. Maps return (N, 3, 3) and their labels (N,).

FLIPS = {"xflip": 3, "yflip": 2}                               # dimension that is mirrored


def _flip(images: Tensor, dim: int, draws: Draws, p: float) -> tuple[Tensor, list[Tensor]]:
    shape = (len(images), 1, 1, 1)
    w = draws.coin(*shape)
    w = torch.where(draws.uniform(*shape) < p, w, 0)
    return torch.where(w == 1, images.flip(dim), images), [w.flatten().float()]


def _scale(draws: Draws, count: int, p: float, width: int, height: int) -> tuple[Tensor, list[Tensor]]:
    w = _gated(draws.normal(count), draws, p)
    s = 2 ** (SCALE_STD * w)
    return _diagonal(1 / s, 1 / s), [w]


def _rotate(draws: Draws, count: int, p: float, width: int, height: int) -> tuple[Tensor, list[Tensor]]:
    theta = _gated((2 * draws.uniform(count) - 1) * pi, draws, p)
    return _rotation(theta), [theta.cos() - 1, theta.sin()]


def _stretch(draws: Draws, count: int, p: float, width: int, height: int) -> tuple[Tensor, list[Tensor]]:
    w, r = draws.normal(count), (2 * draws.uniform(count) - 1) * pi
    w, r = _gated(w, draws, p), _gated(r, draws, DIRECTION_PROBABILITY)
    a = 2 ** (ANISO_STD * w)
    return _rotation(-r) @ _diagonal(1 / a, a) @ _rotation(r), [w * r.cos(), w * r.sin()]


def _translate(draws: Draws, count: int, p: float, width: int, height: int) -> tuple[Tensor, list[Tensor]]:
    w = draws.normal(2, count)
    w = torch.where(draws.uniform(1, count) < p, w, 0.0)
    return _translation(-w[0] * width * TRANSLATE_STD, -w[1] * height * TRANSLATE_STD), [w[0], w[1]]


MAPS: dict[str, Callable] = {"scale": _scale, "rotate_frac": _rotate, "aniso": _stretch, "translate_frac": _translate}


def _gated(value: Tensor, draws: Draws, p: float) -> Tensor:
    return torch.where(draws.uniform(*value.shape) < p, value, 0.0)


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)                   # (N, 3, 3)


def _diagonal(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrix([[x, zero, zero], [zero, y, zero], [zero, zero, one]])


def _rotation(angle: Tensor) -> Tensor:
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return _matrix([[cos, -sin, zero], [sin, cos, zero], [zero, zero, one]])


def _translation(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrix([[one, zero, x], [zero, one, y], [zero, zero, one]])


# ---------------------------------------------------------------------------------------------------------- resampling


@cache
def _taps(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once: a copy to a GPU waits for it."""
    return torch.tensor(TAPS, dtype=dtype, device=device)


def resample(images: Tensor, source: Tensor) -> Tensor:
    """Images whose pixel q shows what lay at G q; beyond the border the image is mirrored.

    The image is doubled, read bilinearly at G q, and halved, so that bilinear reading blurs little. The margin of W - 1
    and H - 1 mirrored pixels is the most that can be mirrored.

    Args:
        images: (N, C, H, W).
        source: G in pixels from the centre, (N, 3, 3).
    """
    count, channels, height, width = images.shape
    taps = _taps(images.dtype, images.device)
    horizontal, vertical = (taps.view(1, 1, *shape).expand(channels, 1, *shape) for shape in ((1, 12), (12, 1)))
    x = F.pad(images, (width - 1, width - 1, height - 1, height - 1), mode="reflect")        # (N, C, 3H - 2, 3W - 2)
    x = F.conv_transpose2d(x, horizontal, stride=(1, 2), padding=(0, 5), groups=channels)
    x = F.conv_transpose2d(x, vertical, stride=(2, 1), padding=(5, 0), groups=channels)      # (N, C, 6H - 4, 6W - 4)

    half = torch.full((count,), 0.5, device=source.device)
    source = _translation(-half, -half) @ _diagonal(4 * half, 4 * half) @ source @ _diagonal(half, half) \
        @ _translation(half, half)                                                           # in samples of the doubled
    shape = (count, channels, 2 * (height + 6), 2 * (width + 6))
    from_unit = _diagonal(half * shape[3], half * shape[2])                                  # grid_sample has [-1, 1]
    to_unit = _diagonal(1 / (half * x.shape[3]), 1 / (half * x.shape[2]))
    grid = F.affine_grid((to_unit @ source @ from_unit)[:, :2], shape, align_corners=False)
    x = F.grid_sample(x, grid.to(x.dtype), mode="bilinear", padding_mode="zeros", align_corners=False)

    x = F.conv2d(x, horizontal, stride=(1, 2), padding=(0, 5), groups=channels)[:, :, :, 3:-3]
    return F.conv2d(x, vertical, stride=(2, 1), padding=(5, 0), groups=channels)[:, :, 3:-3]  # (N, C, H, W)
