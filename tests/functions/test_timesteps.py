import pytest
import torch

from functions.timesteps import SKIP_TYPES, sampling_timesteps, training_timesteps


@pytest.mark.parametrize("B", [1, 2, 7, 64])
def test_training_steps_are_antithetic(B):
    t = training_timesteps(B, 1000, torch.Generator().manual_seed(0))
    half = B // 2 + 1
    assert t.shape == (B,) and t.dtype == torch.long and ((0 <= t) & (t < 1000)).all()
    assert torch.equal(t[half:], 999 - t[:B - half])
    assert torch.equal(t, training_timesteps(B, 1000, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("S", [1, 3, 7, 10, 50, 100, 333, 1000])
@pytest.mark.parametrize("skip_type", sorted(set(SKIP_TYPES) - {"quad"}))
def test_exactly_S_ascending_distinct_steps(skip_type, S):
    steps = sampling_timesteps(1000, S, skip_type)
    assert len(steps) == S and steps == sorted(set(steps)) and 0 <= steps[0] and steps[-1] < 1000
    assert all(type(t) is int for t in steps)


@pytest.mark.parametrize("S", [1, 10, 50, 100, 1000])
def test_uniform_is_ddims_range(S):
    assert sampling_timesteps(1000, S) == list(range(0, 1000, 1000 // S))


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
    assert sampling_timesteps(1000, spec, skip_type) == steps


def test_quad_merges_duplicates():
    assert len(sampling_timesteps(1000, 29, "quad")) == 29
    assert len(sampling_timesteps(1000, 30, "quad")) == 29


@pytest.mark.parametrize(("spec", "skip_type"), [
    (0, "uniform"), (1001, "uniform"), (-1, "uniform"), ("abc", "uniform"), ("", "uniform"), ("10", "spiral"),
    ("ddim999", "uniform"), ("1000,1", "uniform"), ("0,5", "respace")])
def test_refusals(spec, skip_type):
    with pytest.raises(ValueError, match="timesteps|skip type"):
        sampling_timesteps(1000, spec, skip_type)
