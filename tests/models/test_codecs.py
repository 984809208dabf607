"""Pixels to the range of the chain and back."""

from types import SimpleNamespace

import pytest
import torch

from functions.pixels import to_uint8
from models.codecs import Pixels

ALL = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)


def settings(**on):
    names = ("rescaled", "logit_transform", "uniform_dequantization", "gaussian_dequantization")
    return Pixels(SimpleNamespace(shape=(1, 16, 16), **{name: on.get(name, False) for name in names}))


@pytest.mark.parametrize("on", [{}, {"rescaled": True}, {"logit_transform": True}, {"uniform_dequantization": True}])
def test_every_pixel_value_survives_the_round_trip(on):
    codec = settings(**on)
    back = to_uint8(codec.decode(codec.encode(ALL, torch.Generator().manual_seed(0))))
    assert (back.int() - ALL.int()).abs().max() <= (1 if "uniform_dequantization" in on else 0)


def test_ranges():
    x = settings(rescaled=True).encode(ALL)
    assert x.min() == -1 and x.max() == 1 and x.dtype == torch.float32
    dequantised = settings(uniform_dequantization=True).encode(ALL, torch.Generator().manual_seed(0))
    assert ((ALL / 256 - 1e-6 <= dequantised) & (dequantised < (ALL + 1.0) / 256 + 1e-6)).all()
    many, generator = ALL.expand(100, 1, 16, 16), torch.Generator().manual_seed(0)
    noisy = settings(gaussian_dequantization=True).encode(many, generator)
    assert (noisy - ALL / 255).std().item() == pytest.approx(0.01, rel=0.02)


def test_out_of_range_is_clamped_and_rounded_to_nearest():
    outside = torch.tensor([-3.0, 3.0]).view(2, 1, 1, 1)
    assert settings(rescaled=True).decode(outside).flatten().tolist() == [0, 1]
    assert to_uint8(torch.tensor([0.0, 1.49 / 255, 1.51 / 255, 1.0])).tolist() == [0, 1, 2, 255]
