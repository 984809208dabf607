import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from datasets.image_dataset import held_out
from datasets.images import TRANSFORMS, decode, transform
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
