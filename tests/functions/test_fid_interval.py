"""The standard error of FID: its leave-one-out values exactly, its size by drawing fresh sets."""

import numpy as np
import pytest
import torch

from functions import fid_interval
from functions.fid_interval import frechet_interval, frechet_spread, student
from functions.frechet import FeatureStats, covariance_root, frechet_distance

DIM = 60
SCALES = torch.logspace(0, -1.25, DIM, dtype=torch.float64)                 # spectra of features fall about like that


def distance(features, mu, sigma):
    stats = FeatureStats(features.shape[1])
    stats.update(features)
    return frechet_distance(mu, sigma, stats.mean, stats.cov)


def draw(count, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return shift * SCALES + torch.randn(count, DIM, generator=generator, dtype=torch.float64) * SCALES * (1 + shift / 2)


@pytest.mark.parametrize("count", [20, 60, 61, 62, 200])                    # around the rank, where S becomes regular
def test_leave_one_out_values_are_those_of_the_smaller_sets(count, monkeypatch):
    """Without the correction the variance is the plain jackknife's, of all sets without one image."""
    features, mu, sigma = draw(count, 1, 0.3), torch.zeros(DIM), torch.diag(SCALES ** 2)
    without = [distance(features[torch.arange(count) != i], mu, sigma) for i in range(count)]
    expected = (count - 1) / count * np.sum((without - np.mean(without)) ** 2)
    seen = {}
    monkeypatch.setattr(fid_interval, "_excess", lambda *args: seen.setdefault("excess", 0.0))
    monkeypatch.setattr(fid_interval, "BLOCK", 7)
    found, error, _ = frechet_spread(features, mu, sigma)
    outer = (features - features.mean(0)) @ (features - features.mean(0)).T
    pairs = float(outer.square().sum() - outer.diagonal().square().sum()) / (count * (count - 1))
    assert seen and found == pytest.approx(distance(features, mu, sigma), rel=1e-6)
    assert error ** 2 == pytest.approx(expected - 2 * pairs / count ** 2, rel=1e-3)


def test_the_error_of_one_number_is_the_textbooks():
    """D = 1, n large: T = (m - mu)^2 + (s - s_r)^2 by the delta method."""
    x = 2 + 1.5 * torch.randn(20000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, s = x.mean(), x.std()
    influence = 2 * mean * (x - mean) + (s - 1) / s * ((x - mean) ** 2 - s ** 2)
    assert frechet_spread(x, torch.zeros(1), torch.eye(1))[1] == pytest.approx(float(influence.std()) / 20000 ** 0.5,
                                                                              rel=1e-3)


@pytest.mark.parametrize("count", [25, 60, 180])
@pytest.mark.parametrize("shift", [0.0, 0.4])                               # no distance at all, and a real one
def test_the_error_is_the_spread_over_fresh_sets(count, shift):
    """Normal features of 60 dimensions below, at and above their rank: coverage and size over 300 sets."""
    mu, root = torch.zeros(DIM), torch.diag(SCALES)
    sets = [draw(count, seed, shift) for seed in range(300)]
    values, errors, freedoms = np.array([frechet_spread(features, mu, root=root) for features in sets]).T
    assert 0.85 < errors.mean() / values.std() < 1.15
    reach = errors * [student(0.975, freedom) for freedom in freedoms]              # as frechet_interval has it
    assert 0.91 < (abs(values - values.mean()) < reach).mean() < 0.98


def test_interval_is_centred_and_scales_with_its_level():
    features, mu, sigma = draw(100, 3), torch.zeros(DIM), torch.diag(SCALES ** 2)
    value, error, freedom = frechet_spread(features, mu, sigma)
    low, high = frechet_interval(features, mu, sigma)
    assert (low + high) / 2 == pytest.approx(value)
    assert high - low == pytest.approx(2 * error * student(0.975, freedom))
    narrow = frechet_interval(features.float().numpy(), mu.numpy(), sigma.numpy(), level=0.5)
    assert narrow[1] - narrow[0] == pytest.approx(2 * error * student(0.75, freedom), rel=1e-4)


@pytest.mark.parametrize("freedom", [4, 10, 30, 1000])
def test_students_quantiles(freedom):
    stats = pytest.importorskip("scipy.stats")
    for probability in (0.75, 0.95, 0.975):
        assert student(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=0.02)


def test_no_interval_where_nothing_is_left_of_the_jackknife(monkeypatch):
    """An interval of no width would say that the FID is known exactly."""
    mu, sigma = torch.zeros(DIM), torch.diag(SCALES ** 2)
    assert frechet_interval(draw(9, 0, 0.4), mu, sigma) is None and frechet_interval(draw(10, 0, 0.4), mu, sigma)
    monkeypatch.setattr(fid_interval, "_excess", lambda *args: 1e6)
    assert frechet_spread(draw(10, 0, 0.4), mu, sigma).error == 0
    assert frechet_interval(draw(10, 0, 0.4), mu, sigma) is None


def test_odd_sets():
    mu, sigma = torch.zeros(DIM), torch.diag(SCALES ** 2)
    with pytest.raises(ValueError, match="at least 4"):
        frechet_spread(draw(3, 0), mu, sigma)
    value, error, _ = frechet_spread(torch.ones(10, DIM), mu, sigma)           # one picture ten times
    assert value == pytest.approx(float(DIM + (SCALES ** 2).sum()), rel=1e-6) and error == pytest.approx(0, abs=1e-5)
    assert frechet_interval(torch.ones(10, DIM), mu, sigma) is None
    flat = torch.zeros(DIM, DIM)
    flat[0, 0] = 1                                                         # a reference on a line
    assert covariance_root(flat).shape == (DIM, 1) and np.isfinite(frechet_spread(draw(30, 0), mu, flat)).all()
