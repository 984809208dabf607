import pytest
import torch

from functions.schedule import DiscreteSchedule, FlowSchedule, SigmaSchedule
from functions.timesteps import SKIP_TYPES, TIME_SAMPLERS, antithetic_times, lognormal_times, sampling_times
from tests.functions.gaussian import SCHEDULE


@pytest.mark.parametrize("B", [1, 2, 7, 64])
def test_training_steps_are_antithetic(B):
    t = antithetic_times(SCHEDULE, B, torch.Generator().manual_seed(0))
    half = B // 2 + 1
    assert t.shape == (B,) and t.dtype == torch.long and ((0 <= t) & (t < 1000)).all()
    assert torch.equal(t[half:], 999 - t[:B - half])
    assert torch.equal(t, antithetic_times(SCHEDULE, B, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("S", [1, 3, 7, 10, 50, 100, 333, 1000])
@pytest.mark.parametrize("skip_type", sorted(set(SKIP_TYPES) - {"quad"}))
def test_exactly_S_ascending_distinct_steps(skip_type, S):
    steps = sampling_times(SCHEDULE, S, skip_type)
    assert len(steps) == S and steps == sorted(set(steps)) and 0 <= steps[0] and steps[-1] < 1000
    assert all(type(t) is int for t in steps)


@pytest.mark.parametrize("S", [1, 10, 50, 100, 1000])
def test_uniform_is_ddims_range(S):
    assert sampling_times(SCHEDULE, S) == list(range(0, 1000, 1000 // S))


@pytest.mark.parametrize(("spec", "skip_type", "steps"), [
    (4, "uniform", [0, 250, 500, 750]),
    (3, "uniform", [0, 333, 666]),
    (4, "leading", [0, 250, 500, 750]),
    (3, "leading", [0, 333, 666]),
    (4, "linspace", [0, 333, 666, 999]),
    (4, "trailing", [249, 499, 749, 999]),
    (3, "trailing", [332, 666, 999]),
    (4, "respace", [0, 333, 666, 999]),
    (5, "quad", [0, 50, 200, 450, 800]),
    ("ddim4", "uniform", [0, 250, 500, 750]),
    ("2,1,3", "uniform", [0, 333, 334, 667, 833, 999]),
    ("2,1,3", "respace", [0, 333, 334, 667, 833, 999]),
])
def test_by_hand(spec, skip_type, steps):
    assert sampling_times(SCHEDULE, spec, skip_type) == steps


def test_quad_merges_duplicates():
    assert len(sampling_times(SCHEDULE, 29, "quad")) == 29
    assert len(sampling_times(SCHEDULE, 30, "quad")) == 29


@pytest.mark.parametrize(("spec", "skip_type"), [
    (0, "uniform"), (1001, "uniform"), (-1, "uniform"), ("abc", "uniform"), ("", "uniform"), ("10", "spiral"),
    ("ddim999", "uniform"), ("1000,1", "uniform"), ("0,5", "respace")])
def test_refusals(spec, skip_type):
    with pytest.raises(ValueError, match="timesteps|skip_type"):
        sampling_times(SCHEDULE, spec, skip_type)


@pytest.mark.parametrize("schedule", [SCHEDULE, SigmaSchedule(), FlowSchedule(2.0)])
@pytest.mark.parametrize("name", TIME_SAMPLERS)
def test_training_times_are_repeatable_and_in_range(schedule, name):
    first, again = (TIME_SAMPLERS[name](schedule, 500, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.shape == (500,) and torch.equal(first, again)
    assert (first > schedule.end).all()
    assert name in ("lognormal", "vp", "ve") or (first <= schedule.start).all()         # those know no range
    if name in ("uniform", "antithetic"):
        ranks = schedule.rank(first).sort().values
        assert (ranks - torch.linspace(0, 1, 500)).abs().max() < 0.08              # Kolmogorov-Smirnov at n = 500


def test_levels_of_edms_draw():
    levels = lognormal_times(SigmaSchedule(), 4000, torch.Generator().manual_seed(0)).log()
    assert levels.mean().item() == pytest.approx(-1.2, abs=0.08) and levels.std().item() == pytest.approx(1.2, abs=0.06)


@pytest.mark.parametrize("skip_type", ["uniform", "edm"])
def test_continuous_steps(skip_type):
    for schedule in (SigmaSchedule(), FlowSchedule(3.0)):
        times = sampling_times(schedule, 7, skip_type)
        schedule.check_times(times)
        assert len(times) == 7
    assert sampling_times(FlowSchedule(), 4) == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert sampling_times(FlowSchedule(3.0), 2) == pytest.approx([0.75, 1.0])
    with pytest.raises(ValueError, match="known: edm, iddpm, uniform, ve, vp"):
        sampling_times(FlowSchedule(), 4, "quad")
    with pytest.raises(ValueError, match="1 to 100000"):
        sampling_times(SigmaSchedule(), "ddim10")


def test_golden_respacing(golden):
    """guided-diffusion's running float sum, for every count that was recorded."""
    cases = golden("respacing")
    assert len(cases) > 40
    for case in cases:
        schedule, spec = DiscreteSchedule(torch.full((case["num_timesteps"],), 0.01)), case["spec"]
        if case["kind"] == "space_timesteps":
            assert sampling_times(schedule, spec, "respace") == case["timesteps"], spec
        else:
            with pytest.raises(ValueError, match="timesteps"):
                sampling_times(schedule, spec, "respace")
