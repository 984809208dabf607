import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision import transforms

from datasets import images
from datasets.image_dataset import held_out
from datasets.images import TRANSFORMS, UnreadableImage, decode, image_size, transform
from utils.errors import DataError, UserError


@pytest.mark.parametrize("shape", [(40, 30), (30, 41), (33, 33), (16, 50), (16, 16), (7, 9)])
@pytest.mark.parametrize("side", [16, 15])
def test_resize_and_crop_are_torchvisions(noise, shape, side):
    pixels = noise(*shape, 3)
    expected = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side)])(Image.fromarray(pixels))
    np.testing.assert_array_equal(transform(pixels, (side, side), "resize-center-crop", "x"), np.array(expected))
    expected = transforms.Resize((side, side))(Image.fromarray(pixels))
    np.testing.assert_array_equal(transform(pixels, (side, side), "resize", "x"), np.array(expected))


def test_crop_to_a_window_that_is_not_square(noise):
    pixels = noise(20, 12, 1)
    np.testing.assert_array_equal(transform(pixels, (8, 12), "resize-center-crop", "x"), pixels[6:14])


def test_celeba_crop(noise):
    pixels = noise(218, 178, 3)
    np.testing.assert_array_equal(transform(pixels, (128, 128), "celeba", "x"), pixels[57:185, 25:153])


def test_edm_crops(noise):
    pixels = noise(10, 16, 3)
    np.testing.assert_array_equal(transform(pixels, (10, 10), "center-crop", "x"), pixels[:, 3:13])
    wide = transform(pixels, (8, 16), "center-crop-wide", "x")
    assert wide.shape == (16, 16, 3) and not wide[:4].any() and not wide[12:].any()
    np.testing.assert_array_equal(wide[4:12], pixels[1:9])
    with pytest.raises(DataError, match="x: the image is 10x16: no 12x16 window"):
        transform(pixels, (12, 16), "center-crop-wide", "x")


@pytest.mark.parametrize("resample", ["lanczos", "box", "bilinear"])
def test_resampling_filters_are_pils(noise, resample):
    pixels = noise(16, 16, 1)
    expected = Image.fromarray(pixels[..., 0]).resize((8, 4), getattr(Image.Resampling, resample.upper()))
    np.testing.assert_array_equal(transform(pixels, (4, 8), "resize", "x", resample)[..., 0], np.array(expected))


def test_unknown_names_are_listed(noise):
    with pytest.raises(UserError, match=f"'zoom' is unknown; known: {', '.join(sorted(TRANSFORMS))}"):
        transform(noise(4, 4, 3), (4, 4), "zoom", "x")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "TIFF", "PPM"])
def test_lossless_formats_round_trip(noise, png, kind):
    pixels = noise(5, 7, 3)
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decode(png(pixels, kind, **options), "x"), pixels)


def test_held_out_is_disjoint_and_complete():
    train, test = (held_out(0.25, split, 41) for split in ("train", "test"))
    assert sorted([*train, *test]) == list(range(41)) and len(train) == 30
    assert torch.equal(torch.tensor(held_out(0.25, "test", 41)), torch.tensor(test))


# ----------------------------------------------------------------------------------------------------- own photographs

@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_a_picture_is_turned_as_its_camera_says(noise, kind, orientation):
    pixels, file, exif = noise(5, 7, 3), io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    upright = {2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.transpose(1, 0, 2),
               6: pixels[::-1].transpose(1, 0, 2), 7: pixels[::-1, ::-1].transpose(1, 0, 2),
               8: pixels[:, ::-1].transpose(1, 0, 2)}.get(orientation, pixels)
    np.testing.assert_array_equal(decode(file.getvalue(), "x"), upright)
    assert image_size(file.getvalue(), "x") == upright.shape[:2]


def test_damaged_exif_data_do_not_make_a_picture_unreadable(noise, png):
    pixels = noise(5, 7, 3)
    for exif in (b"Exif\0\0MM\0*" + b"\xff" * 30, b"Exif\0\0", b"\xff"):
        assert decode(png(pixels, "JPEG", exif=exif), "x").shape == (5, 7, 3)


def test_the_size_of_what_is_no_picture(png, noise, monkeypatch):
    with pytest.raises(UnreadableImage, match="x: unreadable image: not an image file"):
        image_size(b"hello", "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        image_size(png(noise(5, 7, 3)), "x")


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(20)


def test_heic_names_the_package_that_reads_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images._can_read_heif.cache_clear()
    with pytest.raises(UnreadableImage, match="x.heic: .* a HEIC picture needs .*: pip install pillow-heif"):
        decode(HEIC, "x.heic")
    images._can_read_heif.cache_clear()


def test_heic_is_read_by_that_package(noise, monkeypatch):
    """A stand-in for the package registers a format of PIL as the real one does."""
    pixels = noise(3, 4, 3)

    class Opened(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._mode, self._size, self.tile = "RGB", (4, 3), []

        def load(self):
            self.im = Image.fromarray(pixels).im
            return super().load()

    package = SimpleNamespace(register_heif_opener=lambda: Image.register_open("HEIF", Opened))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    images._can_read_heif.cache_clear()
    np.testing.assert_array_equal(decode(HEIC, "x.heic"), pixels)
    images._can_read_heif.cache_clear()
