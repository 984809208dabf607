import math

import pytest
import torch

from configs.sections import DiffusionSection
from functions.betas import BETAS, make_betas
from functions.schedule import DiscreteSchedule, FlowSchedule, SigmaSchedule, make_schedule

CONTINUOUS = [SigmaSchedule(), SigmaSchedule(0.02, 100, rho=3, rungs=50), FlowSchedule(), FlowSchedule(3.0, 100)]


def make(name, T=1000, **more):
    return make_schedule(DiffusionSection(beta_schedule=name, num_diffusion_timesteps=T, **more))


@pytest.mark.parametrize(("name", "t", "beta"), [
    ("linear", 0, 1e-4), ("linear", 999, 0.02), ("quad", 0, 1e-4), ("quad", 999, 0.02), ("const", 500, 0.02),
    ("jsd", 0, 1 / 1000), ("jsd", 998, 1 / 2), ("jsd", 999, 0.999), ("scaled_linear", 999, 0.02),
    ("sigmoid", 0, (0.02 - 1e-4) / (1 + math.exp(6)) + 1e-4),
    ("cosine", 999, 0.999),
    ("cosine", 0, 1 - (math.cos((0.001 + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2),
])
def test_betas(name, t, beta):
    schedule = make(name)
    assert 1 - (schedule.alpha(t) / schedule.alpha(t - 1)) ** 2 == pytest.approx(beta, rel=1e-6)


def test_guided_diffusions_linear_betas_end_in_the_same_noise_whatever_T():
    assert torch.allclose(BETAS["adm_linear"](0, 0, 1000), BETAS["linear"](1e-4, 0.02, 1000), rtol=1e-12)
    assert BETAS["adm_linear"](0, 0, 4000)[-1].item() == pytest.approx(0.005)


@pytest.mark.parametrize("name", BETAS)
def test_abar_falls_from_one_and_stays_above_zero(name):
    table = make(name).alpha(torch.arange(-1, 1000)).flatten()
    assert table[0] == 1 and table.dtype == torch.float32
    assert (table[1:] < table[:-1]).all() and table[-1] > 0


def test_numbers_are_exact_and_tensors_have_the_shape_of_a_batch():
    schedule = make("linear")
    product = math.prod(1 - b for b in torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist())
    assert schedule.alpha(999) == pytest.approx(math.sqrt(product), rel=1e-12)
    assert schedule.sigma(0) == pytest.approx(0.01, rel=1e-12)          # 1 - abar is not formed from a float32 abar
    for each in (schedule, *CONTINUOUS):
        t = each.at(torch.tensor([0.1, 0.7], dtype=torch.float64))
        for value, name in ((each.alpha, "alpha"), (each.sigma, "sigma"), (each.level, "level")):
            assert value(t).shape == (2, 1, 1, 1) and value(t).dtype == torch.float32, name
            assert value(t, torch.float64)[1].item() == pytest.approx(value(t[1].item()), rel=1e-6)


@pytest.mark.parametrize("schedule", [make("linear"), make("cosine"), *CONTINUOUS])
def test_time_is_the_inverse_of_level_and_rank_of_at(schedule):
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    times = schedule.at(u)
    assert (times[1:] >= times[:-1]).all()
    assert (schedule.rank(times) - u).abs().max() <= (1e-3 if hasattr(schedule, "num_timesteps") else 1e-6)
    for t in times.tolist():
        assert schedule.time(schedule.level(t)) == pytest.approx(t, rel=1e-12)
    levels = schedule.level(times, torch.float64).flatten()
    assert torch.allclose(schedule.time(levels).double(), times.double(), rtol=1e-6)
    x = torch.randn(50, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(schedule.add_noise(x, x, torch.full((50,), schedule.end)), x)


def test_the_nearest_step_of_a_level():
    schedule = make("linear")
    for level in (0.0, 0.0101, 0.5, 3.3, 157.0, 1e6, math.inf):
        nearest = min(range(1000), key=lambda t: abs(schedule.level(t) - level)) if level < math.inf else 999
        assert schedule.time(level) == nearest


def test_add_noise_is_linear_with_the_coefficients():
    schedule = make("linear")
    x0, noise = torch.randn(2, 4, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([-1, 0, 300, 999])
    x = schedule.add_noise(x0, noise, t)
    assert torch.equal(x[0], x0[0])
    torch.testing.assert_close(x[2], schedule.alpha(300) * x0[2] + schedule.sigma(300) * noise[2])


def test_below_walks_down_the_training_times():
    discrete, exists = make("linear").below(torch.tensor([0, 1, 500]), 1)
    assert discrete.tolist() == [0, 0, 499] and exists.tolist() == [False, True, True]
    for schedule in CONTINUOUS:
        ranks = (torch.tensor([0, 1, 2, 40], dtype=torch.float64) + 1e-6 / schedule.rungs)
        if isinstance(schedule, SigmaSchedule):
            t = schedule.at(ranks / (schedule.rungs - 1))
            lowest = schedule.sigma_min
        else:
            t, lowest = (ranks + 1.001).float() / schedule.rungs, 1 / schedule.rungs
        same, always = schedule.below(t, 0)
        assert torch.equal(same, t) and always.all()
        lower, exists = schedule.below(t, 2)
        assert exists.tolist() == [False, False, True, True]
        assert lower[:2].tolist() == pytest.approx([lowest] * 2, rel=1e-5)
        twice = schedule.below(schedule.below(t, 1)[0], 1)[0]
        assert torch.allclose(lower[2:], twice[2:], rtol=1e-4)


def test_a_respaced_chain_has_the_levels_of_its_times_and_tells_the_network_the_original_ones():
    whole = make("cosine")
    times = [3, 250, 999]
    short = whole.respaced(times)
    assert short.num_timesteps == 3
    for k, t in enumerate(times):
        assert short.alpha(k) == pytest.approx(whole.alpha(t), rel=1e-12)
        assert short.network_time(k) == t
    assert short.network_time(torch.tensor([2, 0])).tolist() == [999, 3]
    assert short.respaced([0, 2]).network_time(1) == 999
    with pytest.raises(ValueError, match="respacing is for discrete"):
        SigmaSchedule().respaced([1])


def test_zero_terminal_snr_ends_in_pure_noise_and_starts_as_before():
    schedule = make("linear", prediction="v_prediction", zero_terminal_snr=True)
    assert schedule.alpha(999) == 0 and schedule.level(999) == math.inf
    assert schedule.alpha(0) == pytest.approx(make("linear").alpha(0), rel=1e-12)
    assert schedule.level_range[1] < math.inf


def test_other_ends_and_given_betas():
    chain = make("linear", set_alpha_to_one=False)
    assert chain.alpha(-1) == chain.alpha(0) < 1
    assert make_betas(DiffusionSection(betas=[0.1, 0.2])).tolist() == [0.1, 0.2]


def test_a_respaced_chain_keeps_its_end_and_offset():
    short = make("linear", set_alpha_to_one=False, steps_offset=1, timestep_respacing=50)
    assert short.alpha(-1) == short.alpha(0) < 1 and short.steps_offset == 1
    assert short.respaced([4, 9]).alpha(-1) == short.alpha(4)


@pytest.mark.parametrize("betas", [[], [[0.1]], [0.0, 0.1], [0.1, 1.0, 0.1], [0.1, 1.1], [0.1, float("nan")],
                                   400 * [0.9]])
def test_refusals(betas):
    with pytest.raises(ValueError, match="betas"):
        DiscreteSchedule(betas)
    assert DiscreteSchedule([0.1, 1.0]).alpha(1) == 0                               # 1 is allowed in last place


@pytest.mark.parametrize("make", [
    lambda: SigmaSchedule(1.0, 0.5), lambda: SigmaSchedule(0.0), lambda: SigmaSchedule(rho=0),
    lambda: FlowSchedule(0.0), lambda: FlowSchedule(rungs=1)])
def test_refused_ranges(make):
    with pytest.raises(ValueError, match="needs"):
        make()


@pytest.mark.parametrize(("schedule", "times", "message"), [
    (make("linear"), [5, 5], "ascending"), (make("linear"), [], "non-empty"), (make("linear"), [1000], r"\[0, 1000\)"),
    (make("linear"), [0.5], "whole numbers"), (make("linear"), [-1, 3], "above -1"),
    (SigmaSchedule(), [0.0, 1.0], "above 0"),
    (FlowSchedule(), [0.5, 1.5], r"\(0, 1\]"), (SigmaSchedule(), [1.0, float("nan")], "ascending")])
def test_times_that_a_chain_cannot_visit(schedule, times, message):
    with pytest.raises(ValueError, match=message):
        schedule.check_times(times)
