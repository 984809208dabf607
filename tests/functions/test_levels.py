"""Step lists and training levels of EDM's family against the published ones, and where those break."""

import math

import numpy as np
import pytest
import torch

from functions.levels import (
    LEVELS,
    iddpm_chain,
    lognormal_sigma,
    rho_levels,
    spaced_levels,
    ve_training_sigma,
    vp_betas,
    vp_sigma,
    vp_time,
    vp_training_sigma,
)
from functions.preconditioning import EDM, IDDPM, VE, VP
from functions.prediction import PREDICTIONS, make_prediction
from functions.schedule import DiscreteSchedule, SigmaSchedule, make_schedule
from functions.timesteps import TimeSampler, chain_range, sampling_times
from tests.edm_cases import cases, one

SCHEDULE = DiscreteSchedule(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))


@pytest.mark.parametrize("case", cases("misc", "sigma_steps"))
def test_rho_levels_are_published(case):
    levels = rho_levels(case["num_steps"], case["sigma_min"], case["sigma_max"], case["rho"])
    np.testing.assert_allclose(levels[::-1], case["sigma"], rtol=1e-12)


@pytest.mark.parametrize("case", cases("misc", "sigma_steps_ablation"))
def test_levels_of_every_spacing_are_published(case):
    network = type("Network", (), {"sigma_min": case["net_sigma_min"], "sigma_max": case["net_sigma_max"],
                                   "round": staticmethod(float)})
    levels = sampling_times(SigmaSchedule(), case["num_steps"], case["discretization"], prediction=network)
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
    levels = spaced_levels(9, spacing, 0.05, 50)
    assert levels == sorted(set(levels)) and len(levels) == 9
    assert levels[0] >= 0.05 * (1 - 1e-9) and levels[-1] <= 50 * (1 + 1e-9)
    assert levels[0] == pytest.approx(0.05, rel=0.2) and levels[-1] == pytest.approx(50, rel=0.2)
    assert spaced_levels(1, spacing, 0.05, 50) == [pytest.approx(levels[-1])]


def test_the_network_limits_and_rounds():
    def times(count, prediction, **options):
        return sampling_times(SigmaSchedule(), count, prediction=prediction, **options)

    assert times(4, VE(), sigma_max=1000)[-1] == pytest.approx(100)
    assert times(4, VP(), sigma_min=1e-5)[0] == pytest.approx(2**-10)
    rounded = times(30, IDDPM(), sigma_min=0.006, sigma_max=0.03)
    assert set(rounded) <= set(iddpm_chain()) and rounded == sorted(set(rounded)) and len(rounded) < 30
    assert times(18, EDM()) == pytest.approx(rho_levels(18, 0.002, 80))
    assert times(18, EDM(), rho=3.0) == pytest.approx(rho_levels(18, 0.002, 80, 3.0))
    assert times(1, EDM()) == [pytest.approx(80)]


@pytest.mark.parametrize("spacing", LEVELS)
def test_steps_of_a_discrete_chain_are_those_nearest_to_the_levels(spacing):
    steps, (low, high) = sampling_times(SCHEDULE, 12, spacing), chain_range(SCHEDULE, spacing)
    assert steps == sorted(set(steps)) and all(isinstance(step, int) for step in steps)
    assert SCHEDULE.level_range[0] <= low < high <= SCHEDULE.level_range[1]
    levels = spaced_levels(12, spacing, low, high)
    assert steps == sorted({SCHEDULE.time(level) for level in levels})


@pytest.mark.parametrize("options, message", [
    ({"skip_type": "uniform", "sigma_max": 3.0}, "sigma_max is for --skip_type edm and iddpm and ve and vp, not for"),
    ({"skip_type": "vp", "rho": 3.0}, "rho is for --skip_type edm, not for vp"),
    ({"skip_type": "cosine"}, "skip_type 'cosine' is unknown for this schedule; known: edm, iddpm, uniform, ve, vp"),
])
def test_what_a_spacing_does_not_read_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sampling_times(SigmaSchedule(), 4, **options)


@pytest.mark.parametrize("name, given, expected", [
    ("edm", {}, (0.002, 80)), ("vp", {}, (0.002, 80)), ("ve", {}, (0.02, 80)), ("iddpm", {}, (0.006422337, 80)),
    ("epsilon", {}, (0.002, 80)), ("edm", {"sigma_max": 200.0}, (0.002, 200)), ("ve", {"sigma_min": 0.01}, (0.01, 80)),
])
def test_range_of_the_sigma_schedule(name, given, expected):
    from configs.sections import DiffusionSection

    section = DiffusionSection(schedule="sigma", prediction=name, **given)
    schedule = make_schedule(section)
    assert schedule.level_range == pytest.approx(expected, rel=1e-6)
    assert sampling_times(schedule, 5, prediction=make_prediction(section))[-1] == pytest.approx(expected[1], rel=0.01)
    assert type(make_prediction(section)) is type(PREDICTIONS[name])


def test_constants_of_a_prediction_come_from_the_configuration():
    from configs.sections import DiffusionSection

    made = [make_prediction(DiffusionSection(schedule="sigma", **given)) for given in (
        {"prediction": "edm", "sigma_data": 0.7}, {"prediction": "vp", "beta_d": 10.0, "beta_min": 0.2},
        {"prediction": "ve", "sigma_max": 50.0}, {"prediction": "iddpm"}, {"prediction": "edm"})]
    assert made == [EDM(sigma_data=0.7), VP(10.0, 0.2), VE(sigma_max=50.0), IDDPM(), EDM()]


def test_the_vp_range_that_breaks_upstream_is_a_line():
    with pytest.raises(ValueError, match=r"sigma_min 0\.5 is too high for the vp levels up to 80.*below 0\.09"):
        spaced_levels(8, "vp", 0.5, 80)
    beta_d, beta_min = vp_betas(0.01, 80)
    assert beta_d > 0
    ends = vp_sigma(torch.tensor([1e-3, 1.0], dtype=torch.float64), beta_d, beta_min)
    assert ends.tolist() == pytest.approx([0.01, 80])


@pytest.mark.parametrize("spacing, low, high, message", [
    ("edm", 90.0, 80.0, "sigma_min 90 and sigma_max 80 are no range"),
    ("ve", 0.0, 80.0, "sigma_min 0 and sigma_max 80 are no range"),
    ("iddpm", 1.0, 1.0001, "has no level between them"),
])
def test_impossible_lists_are_lines(spacing, low, high, message):
    with pytest.raises(ValueError, match=message):
        spaced_levels(4, spacing, low, high)


@pytest.mark.parametrize("kind, median, least, most", [
    ("lognormal", math.exp(-1.2), 0, math.inf), ("ve", math.sqrt(2), 0.02, 100),
    ("vp", math.sqrt(math.expm1(19.9 / 8 + 0.05)), 1e-3, 152.2)])
def test_training_levels_follow_their_distribution(kind, median, least, most):
    sampler = TimeSampler(SigmaSchedule(), kind)
    (levels, weight), (again, _) = (sampler.draw(20_000, torch.Generator().manual_seed(0)) for _ in range(2))
    assert levels.shape == (20_000,) and weight is None and torch.equal(levels, again)
    assert least < levels.min() and levels.max() < most
    assert levels.median().item() == pytest.approx(median, rel=0.1)


def test_constants_of_training_levels_come_from_the_configuration():
    from configs.schema import Config

    def drawn(training, **diffusion):
        config = Config(data={"dataset": "ZIP", "image_size": 8}, model={"arch": "unet"}, training=training,
                        diffusion={"schedule": "sigma", **diffusion})
        return TimeSampler.of(config, SigmaSchedule()).draw(4, torch.Generator().manual_seed(0))[0]

    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(4, generator=generator, dtype=torch.float64).float()
    torch.testing.assert_close(drawn({"time_sampler": "ve"}, prediction="ve", sigma_min=0.1, sigma_max=7.0),
                               ve_training_sigma(uniform, 0.1, 7.0))
    torch.testing.assert_close(drawn({"time_sampler": "vp"}, prediction="vp", beta_d=10.0),
                               vp_training_sigma(uniform, 10.0))
    normal = torch.randn(4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn({"time_sampler": "lognormal", "time_mean": -0.4, "time_std": 1.0}),
                               lognormal_sigma(normal, -0.4, 1.0))
