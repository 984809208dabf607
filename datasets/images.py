"""One image: from bytes to uint8 pixels, and the geometric transforms of the data sets' published preprocessing."""

import io
import warnings
from contextlib import suppress
from functools import cache

import numpy as np
from PIL import Image

from utils.errors import DataError, choose
from utils.files import MIB

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif", ".heic", ".heif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")      # not EPS and such: PIL runs programs for them
BYTE_LIMIT = 128 * MIB                        # of an encoded image, before it is opened
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
# EXIF's orientation -> what makes the picture upright.
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}
ORIENTATION = 0x0112
MODES = {1: "L", 3: "RGB"}
RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}

warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class UnreadableImage(DataError):
    """Bytes that are no image, or not all of one; ``data.skip_bad`` tolerates some of these."""


class Unfit(DataError):
    """An image of the wrong shape for ``center-crop-wide``, which is meant to sort such images out."""


def decode(data: bytes, name: str, channels: int = 3, strict: bool = False) -> np.ndarray:
    """Pixels of an encoded image, upright: turned as its EXIF data say.

    Args:
        data: A file in one of ``FORMATS``, or HEIC where pillow-heif is installed.
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
        with _open(data) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"mode {image.mode}: more than 8 bits per channel")
            stored = _channels(image)
            turned = _upright(image)
            pixels = np.array(turned if turned.mode == MODES[channels] else turned.convert(MODES[channels]))
    except Exception as error:                # PIL raises OSError, SyntaxError, struct.error, ... for bad bytes
        raise UnreadableImage(f"{name}: unreadable image: {_reason(error)}") from None
    if strict and stored != channels:
        raise DataError(f"{name}: the image has {stored} channel(s), data.channels is {channels}")
    return pixels.reshape(*pixels.shape[:2], channels)


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) that ``decode`` would give, without decoding. Raises UnreadableImage as ``decode``."""
    try:
        with _open(data) as image:
            sides = image.height, image.width
            turned = image.format != "TIFF" and _orientation(image) > 4        # PIL turns TIFF itself
            return sides[::-1] if turned else sides
    except Exception as error:                # as in decode
        raise UnreadableImage(f"{name}: unreadable image: {_reason(error)}") from None


def stored_channels(data: bytes) -> int:
    """1 to 4, of an image that ``decode`` has read."""
    with _open(data) as image:
        return _channels(image)


def _channels(image: Image.Image) -> int:
    return 3 if image.mode == "P" else len(image.getbands())


def _open(data: bytes) -> Image.Image:
    """An image whose claimed size is bearable; it is not decoded yet."""
    if len(data) > BYTE_LIMIT:
        raise ValueError(f"{len(data) / MIB:,.1f} MiB: a picture may have {BYTE_LIMIT // MIB} MiB at most")
    heif = data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS
    if heif and not _can_read_heif():
        raise ValueError("a HEIC picture needs a further package: pip install pillow-heif")
    image = Image.open(io.BytesIO(data), formats=("HEIF",) if heif else FORMATS)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
    return image


@cache
def _can_read_heif() -> bool:
    """Whether pillow-heif is there; PIL knows its format from now on."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _orientation(image: Image.Image) -> int:
    """1 (upright) to 8; 1 where the EXIF data are missing or damaged."""
    with suppress(Exception):                 # PIL raises SyntaxError, struct.error, ... for damaged ones
        found = image.getexif().get(ORIENTATION, 1)
        return found if found in UPRIGHT else 1
    return 1


def _upright(image: Image.Image) -> Image.Image:
    image.load()                              # a TIFF is turned by this, and says so no longer
    method = UPRIGHT.get(_orientation(image))
    return image if method is None else image.transpose(method)


def encoded(data: bytes) -> bool:
    """Whether ``data`` begins like an image file, rather than being raw pixels."""
    try:
        with _open(data):
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
