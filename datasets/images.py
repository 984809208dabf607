"""One image: from bytes to uint8 pixels, and the geometric transforms of the data sets' published preprocessing."""

import io
import warnings

import numpy as np
from PIL import Image

from utils.errors import DataError, choose

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")      # not EPS and such: PIL runs programs for them
MODES = {1: "L", 3: "RGB"}
RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}

warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class UnreadableImage(DataError):
    """Bytes that are no image, or not all of one; ``data.skip_bad`` tolerates some of these."""


class Unfit(DataError):
    """An image of the wrong shape for ``center-crop-wide``, which is meant to sort such images out."""


def decode(data: bytes, name: str, channels: int = 3, strict: bool = False) -> np.ndarray:
    """Pixels of an encoded image.

    Args:
        data: A file in one of ``FORMATS``.
        name: What to call it in an error.
        channels: 1 (grey) or 3 (RGB); other modes (palette, alpha, ...) are converted, as torchvision's loader does.
        strict: Refuse a file whose stored channels differ from ``channels`` instead of converting.

    Returns:
        uint8, (H, W, channels).

    Raises:
        UnreadableImage: Truncated, not an image, more than 8 bits per channel, or a decompression bomb.
        DataError: ``strict`` and another number of channels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            if image.mode[0] in "IF":
                raise ValueError(f"mode {image.mode}: more than 8 bits per channel")
            stored = 3 if image.mode == "P" else len(image.getbands())
            pixels = np.array(image if image.mode == MODES[channels] else image.convert(MODES[channels]))
    except Exception as error:                # PIL raises OSError, SyntaxError, struct.error, ... for bad bytes
        raise UnreadableImage(f"{name}: unreadable image: {_reason(error)}") from None
    if strict and stored != channels:
        raise DataError(f"{name}: the image has {stored} channel(s), data.channels is {channels}")
    return pixels.reshape(*pixels.shape[:2], channels)


def encoded(data: bytes) -> bool:
    """Whether ``data`` begins like an image file, rather than being raw pixels."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS):
            return True
    except Exception:                         # as in decode
        return False


def transform(pixels: np.ndarray, size: tuple[int, int], how: str, name: str, resample: str = "bilinear") -> np.ndarray:
    """Bring an image to ``size``.

    Args:
        pixels: uint8, (H, W, C).
        size: (height, width) of the result.
        how: Name in ``TRANSFORMS``.
        name: What to call the image in an error.
        resample: Name in ``RESAMPLE``; PIL's filters are antialiased.

    Returns:
        uint8, (height, width, C).

    Raises:
        DataError: The image is empty or does not fit the transform.
    """
    if 0 in pixels.shape:
        raise DataError(f"{name}: empty image of shape {pixels.shape}")
    return choose(TRANSFORMS, how, "transform")(pixels, size, name, choose(RESAMPLE, resample, "resampling filter"))


def keep(pixels, size, name, resample):
    """No change; the size must be right already."""
    if pixels.shape[:2] != tuple(size):
        raise DataError(f"{name}: the image is {_times(pixels.shape)}, data.image_size asks for {_times(size)} and "
                        "this data set is not resized; change data.image_size, or use dataset_tool.py convert")
    return pixels


def resize(pixels, size, name, resample):
    if pixels.shape[:2] == tuple(size):
        return pixels
    squeezed = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    result = np.array(Image.fromarray(squeezed).resize((size[1], size[0]), resample))
    return result.reshape(*size, pixels.shape[-1])


def resize_center_crop(pixels, size, name, resample):
    """Shrink until one side fits, then cut the other: torchvision's Resize(s), CenterCrop(s)."""
    (height, width), (h, w) = size, pixels.shape[:2]
    fitted = (height, int(height * w / h)) if h * width <= w * height else (int(width * h / w), width)
    top, left = round((fitted[0] - height) / 2), round((fitted[1] - width) / 2)
    return resize(pixels, fitted, name, resample)[top:top + height, left:left + width]


def celeba(pixels, size, name, resample):
    """The face crop of DDIM and SA-DPM: rows 57..184 and columns 25..152 of the aligned 218x178 images."""
    if pixels.shape[0] < 185 or pixels.shape[1] < 153:
        raise DataError(f"{name}: the image is {_times(pixels.shape)}, the CelebA crop needs at least 185x153; "
                        "is this img_align_celeba?")
    return resize(pixels[57:185, 25:153], size, name, resample)


def center_crop(pixels, size, name, resample):
    """The largest square in the middle, resized: EDM's ``--transform center-crop``."""
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return resize(pixels[top:top + side, left:left + side], size, name, resample)


def center_crop_wide(pixels, size, name, resample):
    """The middle window of ``size``'s proportions over the full width, resized, on a black square.

    EDM's ``--transform center-crop-wide``; that one takes a window of the source's own proportions and so squeezes it.
    """
    (height, width), (h, w) = size, pixels.shape[:2]
    rows = round(w * height / width)
    if w < width or rows > h or height > width:
        raise Unfit(f"{name}: the image is {_times(pixels.shape)}: no {_times(size)} window over its full width")
    top = (h - rows) // 2
    canvas = np.zeros((width, width, pixels.shape[-1]), np.uint8)
    canvas[(width - height) // 2:][:height] = resize(pixels[top:top + rows], size, name, resample)
    return canvas


TRANSFORMS = {"none": keep, "resize": resize, "resize-center-crop": resize_center_crop, "celeba": celeba,
              "center-crop": center_crop, "center-crop-wide": center_crop_wide}


def _times(shape) -> str:
    return f"{shape[0]}x{shape[1]}"


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"refused as a decompression bomb (limit {Image.MAX_IMAGE_PIXELS} pixels)"
    return "not an image file" if isinstance(error, Image.UnidentifiedImageError) else str(error).split("\n")[0]
