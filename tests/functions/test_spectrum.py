"""Haar bands keep the energy and see what they should; the power of white noise is flat, of a wave one ring."""

import torch

from functions.spectrum import BANDS, haar, radial_power


def test_haar_is_orthonormal_and_splits_by_direction():
    x = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bands = haar(x)
    assert tuple(bands) == BANDS and all(band.shape == (2, 3, 4, 3) for band in bands.values())
    torch.testing.assert_close(sum(band.square().sum() for band in bands.values()), x.square().sum())
    rows = torch.tensor([1.0, -1.0]).repeat(4).view(1, 1, 8, 1).expand(1, 1, 8, 8)      # changes from row to row
    sizes = {name: band.square().sum().item() for name, band in haar(rows).items()}
    assert sizes["hl"] == 64 and sum(sizes.values()) == 64
    assert haar(torch.ones(1, 1, 5, 7))["ll"].shape == (1, 1, 2, 3)


def test_radial_power():
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    power = radial_power(x)
    assert power.shape == (64, 9)
    torch.testing.assert_close(power.mean(0)[1:], torch.ones(8).double(), rtol=0.1, atol=0)
    wave = torch.cos(2 * torch.pi * 3 * torch.arange(16) / 16).view(1, 1, 1, 16).expand(1, 1, 16, 16)
    found = radial_power(wave)[0]
    assert found.argmax() == 3 and found[3] > 1e6 * found[torch.arange(9) != 3].max()
    assert radial_power(torch.ones(1, 1, 8, 12))[0].nonzero().tolist() == [[0]]
