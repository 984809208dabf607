"""Images on one sheet, and sheets on disk."""

from math import isqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.atomic import atomic_write

WIDTH = 640                                                # pixels that a sheet has at least: small images are enlarged
GAP = 2
TEXT = 14                                                  # height of letters on a sheet


def columns_of(count: int) -> int:
    """Of a sheet of ``count`` images, near a square: so that all rows are full, or as many columns as full rows."""
    smallest = isqrt(count - 1) + 1 if count > 1 else 1
    full = (columns for columns in range(smallest, 2 * smallest) if count % columns == 0)
    return next(full, isqrt(count))


def tile(images: Tensor, columns: int | None = None) -> Tensor:
    """uint8 (N, C, H, W) in rows of ``columns`` (default: near a square), with a white gap, as one (C, H', W').

    Images that would not fill the last row are left out. All are
    enlarged by a whole factor until the sheet is WIDTH pixels wide.
    """
    n, c, h, w = images.shape
    columns = min(n, columns or columns_of(n))
    rows = n // columns
    factor = max(1, -(-(WIDTH + GAP - columns * GAP) // (columns * w)))
    images = images[:rows * columns].repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    h, w = h * factor, w * factor
    canvas = images.new_full((c, rows * (h + GAP) - GAP, columns * (w + GAP) - GAP), 255)
    for i, image in enumerate(images):
        top, left = i // columns * (h + GAP), i % columns * (w + GAP)
        canvas[:, top:top + h, left:left + w] = image
    return canvas


def captioned(rows: list[tuple[str, Tensor]]) -> Tensor:
    """Sheets under their texts, one below the other.

    Args:
        rows: (text, images): uint8 (N, C, H, W), C = 1 or 3, of one size.

    Returns:
        uint8 (3, H', W').
    """
    sheets = [tile(images, len(images)) for _, images in rows]
    font = ImageFont.load_default(TEXT)
    width = max(sheet.shape[2] for sheet in sheets)
    height = sum(sheet.shape[1] + 2 * TEXT for sheet in sheets)
    canvas, top = Image.new("RGB", (width, height), "white"), 0
    draw = ImageDraw.Draw(canvas)
    for (text, _), sheet in zip(rows, sheets, strict=True):
        draw.text((GAP, top + TEXT // 3), shortened(text, font, width), fill="black", font=font)
        pixels = sheet.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()
        canvas.paste(Image.fromarray(pixels), (0, top + 2 * TEXT))
        top += sheet.shape[1] + 2 * TEXT
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def shortened(text: str, font, width: int) -> str:
    """As much of a text as fits into so many pixels."""
    text = " ".join(text.split())
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip() + "\u2026"
    return text


def save_png(image: Tensor, path: Path, durable: bool = True) -> None:
    """Write uint8 (C, H, W), C = 1 or 3, atomically."""
    array = image.permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    atomic_write(path, lambda file: picture.save(file, format="PNG"), durable)
