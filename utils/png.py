"""Images on one sheet, and sheets on disk."""

from math import isqrt
from pathlib import Path

from PIL import Image
from torch import Tensor

from utils.atomic import atomic_write

WIDTH = 640                                                # pixels that a sheet has at least: small images are enlarged
GAP = 2


def columns_of(count: int) -> int:
    """Of a sheet of ``count`` images, near a square: so that all rows are full, or as many columns as full rows."""
    smallest = isqrt(count - 1) + 1 if count > 1 else 1
    full = (columns for columns in range(smallest, 2 * smallest) if count % columns == 0)
    return next(full, isqrt(count))


def tile(images: Tensor, columns: int | None = None) -> Tensor:
    """uint8 (N, C, H, W) in rows of ``columns`` (default: near a square), with a white gap, as one (C, H', W').

    Images that would not fill the last row are left out. All are enlarged by a whole factor until the sheet is WIDTH
    pixels wide, a tall one no further than twice as high.
    """
    n, c, h, w = images.shape
    columns = min(n, columns or columns_of(n))
    rows = n // columns
    factor = max(1, min(-(-(WIDTH + GAP - columns * GAP) // (columns * w)), 2 * WIDTH // (rows * h)))
    images = images[:rows * columns].repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    h, w = h * factor, w * factor
    canvas = images.new_full((c, rows * (h + GAP) - GAP, columns * (w + GAP) - GAP), 255)
    for i, image in enumerate(images):
        top, left = i // columns * (h + GAP), i % columns * (w + GAP)
        canvas[:, top:top + h, left:left + w] = image
    return canvas


def save_png(image: Tensor, path: Path, durable: bool = True) -> None:
    """Write uint8 (C, H, W), C = 1 or 3, atomically."""
    array = image.permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    atomic_write(path, lambda file: picture.save(file, format="PNG"), durable)
