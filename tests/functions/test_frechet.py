"""The distance against closed forms and SciPy; statistics against NumPy in any split."""

import numpy as np
import pytest
import torch

from functions.frechet import FeatureStats, covariance_root, frechet_distance


@pytest.fixture
def random():
    return np.random.default_rng(0)


def covariance(random, dim, samples):
    return np.cov(random.normal(size=(samples, dim)) * np.geomspace(1, 0.05, dim), rowvar=False)


def test_shifted_unit_gaussians_are_their_squared_shift_apart(random):
    shift = random.normal(size=20)
    assert frechet_distance(np.zeros(20), np.eye(20), shift, np.eye(20)) == pytest.approx(shift @ shift, abs=1e-12)


def test_diagonal_covariances(random):
    a, b = random.uniform(0.1, 2, (2, 30))
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(np.zeros(30), np.diag(a), np.zeros(30), np.diag(b)) == pytest.approx(expected, abs=1e-12)
    assert frechet_distance(0.0, 4.0, 1.0, 9.0) == pytest.approx(2.0)


def test_rank_deficient_covariances(random):
    """Two sets on one line u: only the variances along it count. A zero covariance: only the trace of the other."""
    u = random.normal(size=50)
    u /= np.linalg.norm(u)
    line = np.outer(u, u)
    assert frechet_distance(np.zeros(50), 4 * line, np.zeros(50), 9 * line) == pytest.approx(1, abs=1e-6)
    full = covariance(random, 50, 200)
    assert frechet_distance(np.zeros(50), 0 * line, np.zeros(50), full) == pytest.approx(np.trace(full))
    assert covariance_root(4 * line).shape == (50, 1)


@pytest.mark.parametrize("samples", [40, 400])
def test_symmetric_zero_to_itself_and_scipy(random, samples):
    linalg = pytest.importorskip("scipy.linalg")
    mu1, mu2 = random.normal(size=(2, 100))
    s1, s2 = covariance(random, 100, samples), covariance(random, 100, 300)
    distance = frechet_distance(mu1, s1, mu2, s2)
    assert distance == pytest.approx(frechet_distance(mu2, s2, mu1, s1), rel=1e-6)
    assert abs(frechet_distance(mu1, s1, mu1, s1)) < 1e-6
    expected = (mu1 - mu2) @ (mu1 - mu2) + np.trace(s1 + s2) - 2 * np.trace(linalg.sqrtm(s1 @ s2)).real
    assert distance == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(*map(torch.from_numpy, (mu1, s1, mu2, s2)), root1=covariance_root(s1)) == distance


def test_2000_features_against_themselves():
    """The case in which square roots of rounding noise would add up: 2,000 features in 300 of 600 directions."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2000, 300, generator=generator) @ torch.randn(300, 600, generator=generator)
    stats = FeatureStats(600)
    stats.update(features)
    assert abs(frechet_distance(stats.mean, stats.cov, stats.mean, stats.cov)) < 1e-12 * np.trace(stats.cov)


def test_pytorch_fid_itself(random):
    score = pytest.importorskip("pytorch_fid.fid_score")
    sets = [random.normal(size=60), covariance(random, 60, 200), random.normal(size=60), covariance(random, 60, 300)]
    try:
        expected = score.calculate_frechet_distance(*sets)
    except TypeError:
        pytest.skip("pytorch-fid's distance does not run with this SciPy: sqrtm has no disp")
    assert frechet_distance(*sets) == pytest.approx(expected, rel=1e-9)


def test_arrays_of_a_pickle_are_read_only_and_taken_without_a_word(recwarn):
    mean, cov = np.zeros(2), np.eye(2)
    mean.flags.writeable = cov.flags.writeable = False
    assert frechet_distance(mean, cov, mean, cov) == 0 and not recwarn.list


def test_any_split_gives_the_same_statistics(random):
    features = random.normal(size=(500, 40)) * np.geomspace(1, 100, 40) + 3
    whole = FeatureStats(40)
    whole.update(features)
    np.testing.assert_allclose(whole.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.cov, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-10)
    for cuts in ([250], [1, 2, 3], [7, 100, 499]):
        merged = FeatureStats(40)
        for part in np.split(random.permutation(features), cuts):
            other = FeatureStats(40)
            other.update(torch.from_numpy(part))
            assert merged.merge(other) is merged
        assert merged.count == 500
        scale = np.sqrt(np.outer(*[np.diagonal(whole.cov)] * 2))
        assert np.abs(merged.mean - whole.mean).max() / np.abs(whole.mean).max() < 1e-12
        assert (np.abs(merged.cov - whole.cov) / scale).max() < 1e-12


def test_what_cannot_be(random):
    stats = FeatureStats(4)
    with pytest.raises(ValueError, match=r"\(3, 5\)"):
        stats.update(np.zeros((3, 5)))
    with pytest.raises(ValueError, match="no features"):
        _ = stats.mean
    stats.update(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="at least 2"):
        _ = stats.cov
    with pytest.raises(ValueError, match="do not agree"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(np.zeros(2), np.eye(2), np.array([0, np.nan]), np.eye(2))
