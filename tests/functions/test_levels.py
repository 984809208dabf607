"""Step lists and training levels of EDM's family against the published ones, and where those break."""

import math

import numpy as np
import pytest
import torch

from functions.levels import (
    DRAWS,
    LEVELS,
    iddpm_chain,
    rho_levels,
    sampling_levels,
    training_levels,
    vp_betas,
    vp_sigma,
    vp_time,
)
from functions.preconditioning import EDM, IDDPM, VE, VP
from tests.edm_cases import cases, one


class Range:
    """A prediction that rounds nothing."""

    def __init__(self, sigma_min, sigma_max):
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def round(self, level):
        return level


@pytest.mark.parametrize("case", cases("misc", "sigma_steps"))
def test_rho_levels_are_published(case):
    levels = rho_levels(case["num_steps"], case["sigma_min"], case["sigma_max"], case["rho"])
    np.testing.assert_allclose(levels[::-1], case["sigma"], rtol=1e-12)


@pytest.mark.parametrize("case", cases("misc", "sigma_steps_ablation"))
def test_levels_of_every_spacing_are_published(case):
    levels = sampling_levels(case["num_steps"], case["discretization"],
                             prediction=Range(case["net_sigma_min"], case["net_sigma_max"]))
    np.testing.assert_allclose(levels[::-1], case["sigma"], rtol=1e-11)


def test_iddpm_chain_is_published():
    np.testing.assert_allclose(iddpm_chain(), one("misc", "iddpm")["u"], rtol=2e-6)
    assert iddpm_chain(np.float64)[999] == pytest.approx(6.42247e-3, rel=1e-5)


def test_vp_times_and_levels_are_published():
    case = one("misc", "vp")
    late = case["t"] > 1e-3                                    # nearer to 0, the published float32 cancels
    assert torch.allclose(vp_sigma(case["t"])[late], case["sigma"][late], 1e-4)
    assert torch.allclose(vp_time(case["sigma"]), case["t_again"], 1e-5, 1e-6)
    assert vp_sigma(torch.tensor(1e-5)).item() == pytest.approx(math.sqrt(math.expm1(1e-6 + 0.995e-9)), rel=1e-6)


@pytest.mark.parametrize("spacing", LEVELS)
def test_lists_ascend_between_their_ends_and_one_step_starts_at_the_highest(spacing):
    levels = sampling_levels(9, spacing, sigma_min=0.05, sigma_max=50)
    assert levels == sorted(set(levels)) and len(levels) == 9
    assert levels[0] >= 0.05 * (1 - 1e-9) and levels[-1] <= 50 * (1 + 1e-9)
    assert levels[0] == pytest.approx(0.05, rel=0.2) and levels[-1] == pytest.approx(50, rel=0.2)
    assert sampling_levels(1, spacing, sigma_min=0.05, sigma_max=50) == [pytest.approx(levels[-1])]


def test_the_network_limits_and_rounds():
    assert sampling_levels(4, sigma_max=1000, prediction=VE())[-1] == pytest.approx(100)
    assert sampling_levels(4, sigma_min=1e-5, prediction=VP())[0] == pytest.approx(2**-10)
    rounded = sampling_levels(30, sigma_min=0.006, sigma_max=0.03, prediction=IDDPM())
    assert set(rounded) <= set(iddpm_chain()) and rounded == sorted(set(rounded)) and len(rounded) < 30
    assert sampling_levels(18, prediction=EDM()) == sampling_levels(18)


def test_the_vp_range_that_breaks_upstream_is_a_line():
    with pytest.raises(ValueError, match=r"sigma_min 0\.5 is too high for the vp levels up to 80.*below 0\.09"):
        sampling_levels(8, "vp", sigma_min=0.5, sigma_max=80)
    beta_d, beta_min = vp_betas(0.01, 80)
    assert beta_d > 0
    ends = vp_sigma(torch.tensor([1e-3, 1.0], dtype=torch.float64), beta_d, beta_min)
    assert ends.tolist() == pytest.approx([0.01, 80])


@pytest.mark.parametrize("options, message", [
    ({"spacing": "cosine"}, "spacing 'cosine' is unknown; known: edm, iddpm, ve, vp"),
    ({"num_steps": 0}, "0 sampling steps are not possible"),
    ({"sigma_min": 90.0}, "noise levels from 90 to 80 are no range"),
    ({"sigma_min": 0.0}, "noise levels from 0 to 80 are no range"),
    ({"spacing": "iddpm", "sigma_min": 1.0, "sigma_max": 1.0001}, "no level from 1 to 1.0001"),
])
def test_impossible_lists_are_lines(options, message):
    with pytest.raises(ValueError, match=message):
        sampling_levels(**{"num_steps": 4} | options)


@pytest.mark.parametrize("kind", DRAWS)
def test_training_levels_follow_their_distribution(kind):
    levels, weight = training_levels(kind, 20_000, torch.Generator().manual_seed(0))
    assert levels.shape == weight.shape == (20_000,) and (weight == 1).all() and (levels > 0).all()
    again, _ = training_levels(kind, 20_000, torch.Generator().manual_seed(0))
    assert torch.equal(levels, again)
    median = {"lognormal": math.exp(-1.2), "ve": math.sqrt(2), "vp": math.sqrt(math.expm1(19.9 / 8 + 0.05))}[kind]
    assert levels.median().item() == pytest.approx(median, rel=0.1)
