"""Metrics against formulas written independently here, and against torch-fidelity where it is installed."""

import numpy as np
import pytest
import torch

from functions.frechet import FeatureStats, frechet_distance
from functions.metrics import (
    _radii,
    inception_score,
    inception_score_of_blocks,
    kernel_distance,
    kid,
    kid_error,
    precision_recall,
)
from tests.conftest import load_kept


@pytest.fixture(scope="module")
def sets():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(300, 16, generator=generator)
    return real, torch.randn(260, 16, generator=generator) * 1.2 + 0.2


def test_kernel_distance_is_the_sum_over_pairs(sets):
    x, y = (part[:12].double().numpy() for part in sets)

    def k(a, b):
        return (a @ b / 16 + 1) ** 3

    expected = (sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (12 * 11)
                + sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (12 * 11)
                - 2 * sum(k(a, b) for a in x for b in y) / 144)
    assert kernel_distance(*(part[:12] for part in sets)) == pytest.approx(expected, rel=1e-12)


def test_kid_of_whole_sets_and_its_error(sets):
    real, fake = sets
    whole = kid(real[:200], fake[:200], subsets=3, subset_size=1000)           # every subset is the whole set
    assert whole.mean == pytest.approx(kernel_distance(real[:200], fake[:200]), rel=1e-12)
    assert whole.std == whole.std_error > 1e-3
    some = kid(real, fake, subsets=20, subset_size=50)
    assert some.std_error < some.std and abs(some.mean - kernel_distance(real, fake)) < 3 * some.std
    for few in ((real[:1], fake), (real, fake[:3])):
        with pytest.raises(ValueError, match="at least 2 real and 4 fake"):
            kid(*few)


@pytest.mark.parametrize("shift", [0.0, 0.3])                                  # alike, where pairs decide; different
@pytest.mark.parametrize("subsets, size", [(5, 1000), (40, 60)])               # whole sets, and subsets of them
def test_error_of_kid_is_the_spread_over_fresh_sets(shift, subsets, size):
    generator, scales = torch.Generator().manual_seed(1), torch.logspace(0, -1, 16)
    real = torch.randn(1000, 16, generator=generator) * scales
    found = [kid(real, torch.randn(200, 16, generator=generator) * scales + shift, subsets=subsets, subset_size=size)
             for _ in range(60)]
    spread = np.std([each.mean for each in found])
    assert 0.8 < np.mean([each.std_error for each in found]) / spread < 1.25


def test_error_of_kid_counts_all_real_features_as_given(sets):
    real, fake = sets
    once, often = (kid_error(each, fake, subsets=5, subset_size=50) for each in (real, real.repeat(30, 1)))
    assert often == pytest.approx(once, rel=1e-9)


def test_published_evaluator_on_made_up_features():
    """Precision, recall, radii, statistics, distance, and an Inception Score over blocks, of guided-diffusion."""
    cases = {case["kind"]: case for case in load_kept("evaluator")}
    case = cases["evaluator"]
    real, fake = case["reference"], case["sample"]
    assert precision_recall(real, fake, k=case["nearest"]) == (case["precision"], case["recall"])
    assert _radii(fake, case["nearest"], 64).numpy() == pytest.approx(case["squared_radii_sample"].numpy(), rel=1e-5)
    moments = []
    for name, features in (("reference", real), ("sample", fake)):
        stats = FeatureStats(features.shape[1])
        stats.update(features)
        assert stats.mean == pytest.approx(case[f"mu_{name}"].numpy(), rel=1e-5, abs=1e-6)
        assert stats.cov == pytest.approx(case[f"sigma_{name}"].numpy(), rel=1e-5, abs=1e-6)
        moments += [stats.mean, stats.cov]
    assert frechet_distance(*moments) == pytest.approx(case["frechet_distance"], rel=1e-6)
    case = cases["inception_score"]
    score = inception_score_of_blocks(case["logits"], block=case["split_size"])
    assert score.mean == pytest.approx(case["inception_score"], rel=1e-6)


@pytest.mark.parametrize("block", [7, 64, 4096])
def test_precision_recall_brute_force(sets, block):
    real, fake = (part.double().numpy() for part in sets)

    def covered(points, centres):
        among = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        radii = np.sort(among, axis=1)[:, 3]                                   # column 0 is the point itself
        return (np.linalg.norm(points[:, None] - centres[None], axis=-1) <= radii).any(1).mean()

    assert precision_recall(*sets, block=block) == (covered(fake, real), covered(real, fake))


def test_precision_recall_extremes(sets):
    real, _ = sets
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1000) == (0.0, 0.0)
    assert precision_recall(torch.zeros(8, 4), torch.zeros(9, 4)) == (1.0, 1.0)          # repeated points have radius 0
    with pytest.raises(ValueError, match="more than k = 3"):
        precision_recall(real[:3], real)


def test_inception_score_of_certain_and_of_constant_answers():
    one_hot = 1000 * torch.eye(10).repeat(50, 1)
    assert inception_score(one_hot, splits=1).mean == pytest.approx(10, rel=1e-9)
    assert inception_score(torch.zeros(100, 10)) == pytest.approx((1, 0))
    with pytest.raises(ValueError, match="at least as many"):
        inception_score(torch.zeros(9, 10))


def test_torch_fidelity_on_the_same_features(sets):
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, fake = (part.double() for part in sets)
    theirs = kid_features_to_metric(fake, real, kid_subset_size=100, verbose=False)
    ours = kid(real, fake, subset_size=100)
    assert (ours.mean, ours.std) == pytest.approx(tuple(theirs.values()), rel=1e-6)
    theirs = prc_features_to_metric(fake, real, verbose=False)
    assert precision_recall(real, fake) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)
    assert inception_score(fake) == pytest.approx(tuple(isc_features_to_metric(fake).values()), rel=1e-6)
