from types import SimpleNamespace

import pytest
import torch

from functions.pixels import from_model_range, random_flip, to_model_range, to_uint8

ALL = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)


def settings(**on):
    names = ("rescaled", "logit_transform", "uniform_dequantization", "gaussian_dequantization")
    return SimpleNamespace(**{name: on.get(name, False) for name in names})


@pytest.mark.parametrize("on", [{}, {"rescaled": True}, {"logit_transform": True}, {"uniform_dequantization": True}])
def test_every_pixel_value_survives_the_round_trip(on):
    data = settings(**on)
    x = to_model_range(ALL, data, torch.Generator().manual_seed(0))
    back = to_uint8(from_model_range(x, data))
    assert (back.int() - ALL.int()).abs().max() <= (1 if "uniform_dequantization" in on else 0)


def test_ranges():
    x = to_model_range(ALL, settings(rescaled=True))
    assert x.min() == -1 and x.max() == 1 and x.dtype == torch.float32
    dequantised = to_model_range(ALL, settings(uniform_dequantization=True), torch.Generator().manual_seed(0))
    assert ((ALL / 256 - 1e-6 <= dequantised) & (dequantised < (ALL + 1.0) / 256 + 1e-6)).all()
    many, generator = ALL.expand(100, 1, 16, 16), torch.Generator().manual_seed(0)
    noisy = to_model_range(many, settings(gaussian_dequantization=True), generator)
    assert (noisy - ALL / 255).std().item() == pytest.approx(0.01, rel=0.02)


def test_out_of_range_is_clamped_and_rounded_to_nearest():
    outside = torch.tensor([-3.0, 3.0]).view(2, 1, 1, 1)
    assert from_model_range(outside, settings(rescaled=True)).flatten().tolist() == [0, 1]
    assert to_uint8(torch.tensor([0.0, 1.49 / 255, 1.51 / 255, 1.0])).tolist() == [0, 1, 2, 255]


def test_flip_mirrors_half_of_the_images_left_to_right():
    images = torch.arange(6, dtype=torch.uint8).view(1, 1, 2, 3).expand(1000, 1, 2, 3)
    flipped = random_flip(images, torch.Generator().manual_seed(0))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    untouched = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ untouched).all() and 400 < mirrored.sum() < 600
