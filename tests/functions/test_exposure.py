"""The measures on Gaussian data with the exact network, where every one of them has a closed form."""

from math import copysign, sqrt

import numpy as np
import pytest
import torch

from functions.denoiser import Denoiser
from functions.denoising import ddpm_steps, generalized_steps
from functions.exposure import (
    ExposureBias,
    Moments,
    accumulated_gaps,
    eps_norm,
    estimation_gap,
    fit_scaler,
    training_norms,
)
from functions.frechet import FeatureStats
from functions.schedule import FlowSchedule
from functions.timesteps import sampling_times
from tests.functions.gaussian import SCHEDULE, abar, exact

ABAR = abar


def noise_stream(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    return lambda index=None: torch.randn(shape, generator=generator)


# ------------------------------------------------------------------------------------------------------------- moments

def test_moments_are_those_of_numpy_in_any_number_of_parts():
    values = 5 + torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(0))
    parts = [Moments() for _ in range(3)]
    for part, rows in zip(parts, values.split([10, 25, 15]), strict=True):
        part.add("a", rows[:5])
        part.add("a", rows[5:])
    whole = Moments().merge(parts[0]).merge(parts[1].cpu()).merge(parts[2])
    expected = values.double().numpy().reshape(50, -1)
    np.testing.assert_allclose(whole.mean("a"), expected.mean(0), rtol=1e-12)
    assert whole.variance("a") == pytest.approx(expected.var(0, ddof=1).mean(), rel=1e-12)
    assert whole.standard_error("a") == pytest.approx(sqrt(expected.var(0, ddof=1).mean() / 50), rel=1e-12)


# ----------------------------------------------------------------------------------------------------------- eps-norms

def test_training_norms_are_those_of_the_noise():
    """With v = 1 the exact eps of x_t ~ N(0, I) is sqrt(1 - abar) x_t, whose norm is that of a chi distribution."""
    shape, steps = (256, 1, 16, 16), [0, 300, 999]
    noise = noise_stream(0, shape)
    norms = training_norms(exact(1.0), noise(), steps, noise)
    assert norms.shape == (256, 3)
    chi = sqrt(256) * (1 - 1 / (4 * 256))
    for norm, t in zip(norms.mean(0), steps, strict=True):
        assert norm.item() == pytest.approx(sqrt(1 - ABAR(t)) * chi, abs=4 * sqrt((1 - ABAR(t)) / 2 / 256))


# ------------------------------------------------------------------------------------------------------- variance error

def ddim_variances(v, steps, start_variance):
    """Var(x_s) below the start: a DDIM step with the exact eps multiplies x by a known factor."""
    found, variance = {}, start_variance
    for i, j in zip(reversed(steps), [*reversed(steps[:-1]), -1], strict=True):
        slope = sqrt(1 - ABAR(i)) / (ABAR(i) * v + 1 - ABAR(i))
        factor = sqrt(ABAR(j)) * (1 - sqrt(1 - ABAR(i)) * slope) / sqrt(ABAR(i)) + sqrt(1 - ABAR(j)) * slope
        variance *= factor**2
        found[j] = variance
    return found


def ancestral_variances(v, steps, start_variance):
    found, variance = {}, start_variance
    for i, j in zip(reversed(steps), [*reversed(steps[:-1]), -1], strict=True):
        b = 1 - ABAR(i) / ABAR(j)
        estimate = sqrt(ABAR(i)) * v / (ABAR(i) * v + 1 - ABAR(i))
        factor = (sqrt(ABAR(j)) * b * estimate + sqrt(1 - b) * (1 - ABAR(j))) / (1 - ABAR(i))
        variance = factor**2 * variance + (b if j >= 0 else 0)
        found[j] = variance
    return found


@pytest.mark.parametrize(("sampler", "variances"), [
    (generalized_steps, ddim_variances), (ddpm_steps, ancestral_variances)])
@pytest.mark.parametrize("start", [None, 500])
def test_exposure_bias_is_its_closed_form(sampler, variances, start):
    v, shape, steps = 0.25, (512, 1, 16, 16), [t for t in sampling_times(SCHEDULE, 20) if start is None or t <= start]
    noise, options = noise_stream(1, shape), {"clip_denoised": False} if sampler is ddpm_steps else {}
    x0 = 0.3 + sqrt(v) * noise()                               # a mean, which both variances must leave out
    data, inputs = Moments(), []
    data.add("x0", x0)

    x = noise() if start is None else SCHEDULE.add_noise(x0, noise(), torch.full((len(x0),), start))
    last = sampler(exact(v, mean=0.3), x, steps, noise_fn=noise, **options,
                   callback=lambda index, t, x, x0, eps: inputs.append((t, x)))
    bias = ExposureBias(SCHEDULE, data)
    for s, seen in [*inputs[1:], (-1, last)]:
        bias.add(start, s, seen, x0)
    begin = 1.0 if start is None else ABAR(start) * v + 1 - ABAR(start)
    for s, variance in variances(v, steps, begin).items():
        result = bias.result(start, s)
        expected = variance - (ABAR(s) * v + 1 - ABAR(s))
        assert result["delta"] == pytest.approx(expected, abs=4 * result["standard_error"])
        assert result["delta"] == result["var_chain"] - result["var_q"]
        assert result["root_delta"] == copysign(sqrt(abs(result["delta"])), result["delta"])
        assert result["standard_error"] < 2 * sqrt(2 * (variance**2 + v**2) / x0.numel())
    if start is None:                                          # there is something to find: 20 steps are few
        assert abs(result["delta"]) > 10 * result["standard_error"]


def test_standard_error_is_the_spread_over_repetitions():
    v, shape, deltas, errors = 0.5, (64, 1, 8, 8), [], []
    for seed in range(60):
        noise = noise_stream(seed, shape)
        x0, data = sqrt(v) * noise(), Moments()
        data.add("x0", x0)
        bias = ExposureBias(SCHEDULE, data)
        bias.add(None, 200, SCHEDULE.add_noise(x0, noise(), torch.full((len(x0),), 200)), x0)
        result = bias.result(None, 200)
        deltas.append(result["delta"])
        errors.append(result["standard_error"])
    assert np.mean(errors) == pytest.approx(np.std(deltas), rel=0.35)
    assert abs(np.mean(deltas)) < 4 * np.mean(errors) / sqrt(60)


# ------------------------------------------------------------------------------------------------------ estimation gap

def test_gap_of_a_constant_error_is_that_error():
    """A network that knows x0 and adds delta: d_i is delta at every step of the chain."""
    x0, delta = torch.full((2, 1, 4, 4), 0.3), torch.linspace(0, 0.1, 16).view(1, 1, 4, 4)

    def network(x, t):
        return (x - SCHEDULE.alpha(t) * x0) / SCHEDULE.sigma(t) + delta

    seen = []
    generalized_steps(Denoiser(network, SCHEDULE), noise_stream(0, x0.shape)(), [0, 100, 500],
                      callback=lambda index, t, x, _, eps: seen.append(estimation_gap(SCHEDULE, x, eps, x0, t)))
    for gap in seen:
        torch.testing.assert_close(gap, delta.expand_as(gap), rtol=0, atol=1e-5)


def test_accumulated_gap_is_the_recursion():
    gaps = {t: torch.tensor([1.0 + t, -2.0]) for t in (50, 400, 900)}
    found = accumulated_gaps(SCHEDULE, [50, 400, 900], gaps)
    total = torch.zeros(2, dtype=torch.float64)
    for i, j in ((900, 400), (400, 50), (50, -1)):
        a, n = ABAR(i), ABAR(j)
        b = 1 - a / n
        total = sqrt(1 - b) * (1 - n) / (1 - a) * total + b / (sqrt(1 - b) * sqrt(1 - a)) * gaps[i].double()
        torch.testing.assert_close(found[j].double(), total, rtol=1e-5, atol=0)


def test_no_gap_accumulates_over_a_step_from_noise_alone():
    gaps = {t: torch.tensor([1.0]) for t in (0.25, 0.5, 1.0)}
    found = accumulated_gaps(FlowSchedule(), [0.25, 0.5, 1.0], gaps)
    assert found[0.5] == 0 and found == accumulated_gaps(FlowSchedule(), [0.25, 0.5], gaps) | {0.5: found[0.5]}


# ------------------------------------------------------------------------------------------------------ fitted scaling

def stats_of(norms):
    stats = FeatureStats(norms.shape[1])
    stats.update(norms)
    return stats


def fitted(model, shape, seed=1):
    """The fit of 10 ancestral steps for a network whose eps is 2% too large."""
    network, steps, noise = exact(1.0, factor=1.02), sampling_times(SCHEDULE, 10), noise_stream(seed, shape)

    def norms_of(scaler):
        norms, noise = [], noise_stream(seed + 1000, shape)
        ddpm_steps(network, noise(), steps, eps_scaler=scaler, clip_denoised=False, noise_fn=noise,
                   callback=lambda index, t, x, x0, eps: norms.append(eps_norm(eps)))
        return stats_of(torch.stack(norms[::-1], 1))

    return fit_scaler(norms_of, stats_of(training_norms(network, noise(), steps, noise)), model)


def test_fit_finds_an_eps_that_is_two_percent_too_large():
    fit = fitted("auto", (512, 1, 32, 16))
    assert fit.k == 0 and fit.b == pytest.approx(1.02, abs=0.002)
    assert fit.mismatch < 0.005 < 0.015 < fit.before and fit.b_error < 0.0015


def test_the_errors_of_a_fit_are_its_spread():
    fits = [fitted("linear", (64, 1, 16, 16), seed) for seed in range(12)]
    for value, error in (("k", "k_error"), ("b", "b_error")):
        assert np.std([getattr(fit, value) for fit in fits]) == pytest.approx(
            np.mean([getattr(fit, error) for fit in fits]), rel=0.6)


def test_fit_recovers_a_linear_scaling_without_noise():
    """Norms that respond to lambda as in a chain, each step to all before it, and hardly differ between images."""
    def respond(scaler):
        lambdas = scaler[0] * np.arange(10) + scaler[1]
        norms = 3 * np.exp(-0.7 * np.cumsum(np.log(lambdas)[::-1])[::-1])
        return stats_of(torch.from_numpy(norms * (1 + 1e-9 * np.array([[-1.0], [1.0]]))))

    for model in ("linear", "auto"):
        fit = fit_scaler(respond, respond((0.003, 1.01)), model)
        assert (fit.k, fit.b) == (pytest.approx(0.003, abs=1e-5), pytest.approx(1.01, abs=1e-4))
        assert fit.mismatch < 1e-4
    assert fit_scaler(respond, respond((0.0, 1.0)))[:2] == (0, 1)
