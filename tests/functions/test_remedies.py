"""Remedies while sampling, on Gaussian data where what each of them does has a closed form."""

from math import sqrt

import pytest
import torch

from functions.analytic import Gamma, analytic_variance
from functions.chain import Chain
from functions.denoiser import Denoiser
from functions.denoising import SAMPLERS, ddpm_steps, generalized_steps, network_calls, step_variances
from functions.ode import euler_steps, heun_steps
from functions.remedies import DCW, REMEDIES, Remedy, Restart, TimeShift
from functions.schedule import DiscreteSchedule, FlowSchedule, SigmaSchedule
from functions.timesteps import sampling_times
from tests.functions.gaussian import SCHEDULE, exact, variance

ONE = torch.ones(1, 1, 2, 2, dtype=torch.float64)
SIGMA = SigmaSchedule()


def normal(seed, shape=(2, 1, 4, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def zeros(index):
    return torch.zeros_like(ONE)


def inputs_of(sampler, denoiser, x, times, **options):
    """(t, x, x0', eps) of each step."""
    seen = []
    sampler(denoiser, x, times, callback=lambda index, t, x, x0, eps: seen.append((t, x, x0, eps)), **options)
    return seen


# ---------------------------------------------------------------------------------------------- one knob, three hands


def gain(schedule, scaler, i, j):
    """g of remedies.md under epsilon scaling: y_j = x0' + g level_j e."""
    return 1 + (1 - 1 / scaler) * (schedule.level(i) / schedule.level(j) - 1)


@pytest.mark.parametrize("schedule", [SCHEDULE, SIGMA, FlowSchedule()])
def test_epsilon_scaling_is_a_gain_of_the_noise(schedule):
    i, j = schedule.time(2.0), schedule.time(0.5)
    x = normal(0)
    denoiser = exact(0.5, schedule, "v_prediction")
    x0, e, _ = denoiser(x, i)
    chain = Chain(denoiser, [j, i], eps_scaler=1.02)
    scaled = chain.look(x, next(chain.links()))
    y = (schedule.alpha(j) * scaled.x0 + schedule.sigma(j) * scaled.eps) / schedule.alpha(j)
    torch.testing.assert_close(y, x0 + gain(schedule, 1.02, i, j) * schedule.level(j) * e, rtol=1e-12, atol=1e-12)


def test_dcw_in_pixels_on_sigma_is_epsilon_scaling_through_the_gain():
    times, scaler, x = sampling_times(SIGMA, 12), 1.013, 80 * normal(0)

    class Fitted(DCW):
        """The strength that the identity asks for at each step."""

        def after(self, chain, x, link):
            if link.last:
                return x
            strength = gain(SIGMA, scaler, link.i, link.j) - 1
            return DCW(strength * chain.times[-1] / link.i, pixel=True).after(chain, x, link)

    class Scaled(Denoiser):
        """The exact network, its eps divided in every step but the last, which has no gain."""

        def raw(self, x, t):
            return exact(0.3, SIGMA).raw(x, t) / (scaler if t > times[0] else 1)

    corrected = euler_steps(exact(0.3, SIGMA), x, times, remedies=[Fitted(1.0)])
    divided = euler_steps(Scaled(None, SIGMA), x, times)
    assert (corrected - divided).abs().max() < 1e-6 * divided.abs().max()
    plain = euler_steps(exact(0.3, SIGMA), x, times)
    assert (corrected - plain).abs().max() > 1e-2 * plain.abs().max()


# ---------------------------------------------------------------------------------------------------------------- DCW


def haar(x):
    """ll, lh, hl, hh, orthonormal, (B, C, H/2, W/2) each."""
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return [(a + b + c + d) / 2, (a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2]


@pytest.mark.parametrize("schedule", [SCHEDULE, SIGMA])
def test_dcw_moves_the_bands_of_a_haar_transform(schedule):
    times = [schedule.time(level) for level in (0.5, 2.0, 20.0)]
    denoiser, x = exact(0.5, schedule), 3 * normal(1)
    plain = inputs_of(euler_steps, denoiser, x, times)
    moved = inputs_of(euler_steps, denoiser, x, times, remedies=[DCW(0.1, 0.02)])
    w = schedule.sigma(times[2]) / schedule.sigma(times[2]), schedule.sigma(times[1]) / schedule.sigma(times[2])
    assert torch.equal(moved[0][1], plain[0][1])
    x_j, x0 = plain[1][1], plain[0][2]
    for band, (before, estimate, after) in enumerate(zip(haar(x_j), haar(x0), haar(moved[1][1]), strict=True)):
        strength = 0.1 * w[0] if band == 0 else 0.02 * (1 - w[0])
        torch.testing.assert_close(after, before + strength * (before - estimate), rtol=1e-12, atol=1e-12)
    x_j = euler_steps_once(denoiser, moved[1][1], times[1], times[0])
    x0 = denoiser(moved[1][1], times[1]).x0
    for band, (before, estimate, after) in enumerate(zip(haar(x_j), haar(x0), haar(moved[2][1]), strict=True)):
        strength = 0.1 * w[1] if band == 0 else 0.02 * (1 - w[1])
        torch.testing.assert_close(after, before + strength * (before - estimate), rtol=1e-12, atol=1e-12)


def euler_steps_once(denoiser, x, i, j):
    x0, e, _ = denoiser(x, i)
    return denoiser.schedule.alpha(j) * x0 + denoiser.schedule.sigma(j) * e


def test_dcw_takes_the_estimate_of_the_last_call():
    """Heun's corrector is the later one."""
    times, denoiser, x = [1.0, 5.0], exact(0.5, SIGMA), 5 * normal(2)
    ahead = euler_steps_once(denoiser, x, 5.0, 1.0)
    plain = inputs_of(heun_steps, denoiser, x, times)[1][1]
    moved = inputs_of(heun_steps, denoiser, x, times, remedies=[DCW(0.1, pixel=True)])[1][1]
    torch.testing.assert_close(moved, plain + 0.1 * (plain - denoiser(ahead, 1.0).x0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("whole", [True, False])
def test_dcw_corrects_the_last_step_where_it_does_not_end_in_the_estimate(whole):
    schedule = DiscreteSchedule([0.05] * 50, set_alpha_to_one=whole)
    x, denoiser = normal(2), exact(0.5, schedule)
    plain, moved = (generalized_steps(denoiser, x, [40], remedies=each) for each in ([], [DCW(0.1, pixel=True)]))
    assert torch.equal(moved, plain) == whole
    torch.testing.assert_close(moved, plain + 0.1 * (plain - denoiser(x, 40).x0), rtol=1e-12, atol=0)


# --------------------------------------------------------------------------------------------------------- time shift


@pytest.mark.parametrize("v0", [0.0, 0.25])
def test_time_shift_finds_a_planted_shift(v0):
    """Images that have the variance of other times than the chain believes."""
    planted, x = torch.tensor([480, 500, 517]), normal(0, (3, 1, 16, 16))
    std = torch.tensor([sqrt(variance(t, v0)) for t in planted.tolist()], dtype=x.dtype)
    x = x * (std / x.flatten(1).std(1)).view(-1, 1, 1, 1)
    shift, chain = TimeShift(80, 300, data_variance=v0), Chain(exact(v0), [0, 500, 999])
    assert torch.equal(shift.time_of(chain, x, 500, 1, 999), planted)
    assert shift.time_of(chain, x, 500, 490, 505).tolist() == [490, 500, 505]
    assert shift.time_of(chain, x, 450, 1, 999).tolist() == [480, 490, 490]                    # W/2 to either side


def test_the_papers_form_continues_from_the_time_found_and_the_codes_leads_to_it():
    """On data that are a point, x_t = sigma_t n: an image with the variance of another time is given that time."""
    times, x = [100, 400, 700], normal(3, (2, 1, 64, 64))
    x = x / x.flatten(1).std(1).view(-1, 1, 1, 1) * torch.tensor([0.97, 0.99], dtype=torch.float64).view(-1, 1, 1, 1)
    for form in ("paper", "code"):
        calls = []
        shift = TimeShift(200, 350, form)
        seen = inputs_of(generalized_steps, exact(1e-12, calls=calls), x, times, remedies=[shift])
        assert calls[0] == 700 and calls[2] == 100
        chain = Chain(exact(1e-12), times)
        if form == "paper":                                    # x_400 has 1/sigma_700 as much variance as q's
            found = shift.time_of(chain, seen[1][1], 400, 101, 999)
            assert torch.equal(calls[1], found) and (found < 400).all()
            # from the time found the exact flow leads on: sigma_100 / sigma_found of it is left
            left = (SCHEDULE.sigma(100) / SCHEDULE.sigma(found, torch.float64)) * seen[1][1]
        else:
            found = shift.time_of(chain, x, 400, 0, 699)
            assert calls[1] == 400
            torch.testing.assert_close(seen[1][1], SCHEDULE.sigma(found, torch.float64) / SCHEDULE.sigma(700) * x,
                                       rtol=1e-6, atol=1e-6)
            left = SCHEDULE.sigma(100) / SCHEDULE.sigma(400) * seen[1][1]
        torch.testing.assert_close(seen[2][1], left, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_times_of_each_image_are_its_own_in_every_sampler(name):
    """A batch is what its images are alone."""
    x, options = normal(4, (3, 2, 8, 8)) * torch.tensor([0.8, 1.0, 1.2]).view(-1, 1, 1, 1), {}
    noise = normal(5, (3, 2, 8, 8))
    for form in ("paper", "code"):
        remedies = [TimeShift(120, 200, form), DCW(0.05, 0.01)]
        together = SAMPLERS[name](exact(0.5), x, [0, 200, 400, 600, 800], noise_fn=lambda i: noise, remedies=remedies,
                                  **options)
        for n in range(3):
            alone = SAMPLERS[name](exact(0.5), x[n:n + 1], [0, 200, 400, 600, 800],
                                   noise_fn=lambda i, n=n: noise[n:n + 1], remedies=remedies, **options)
            torch.testing.assert_close(together[n:n + 1], alone, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ restart


@pytest.mark.parametrize("schedule", [SCHEDULE, SIGMA])
def test_restart_contracts_a_planted_error_by_the_predicted_factor(schedule):
    """y at MIN is off by an error. Noise is added on top of it, and the flow back takes both down alike: each repeat
    multiplies the error by sqrt((v + MIN^2) / (v + MAX^2)), y = x / alpha."""
    v, low, high = 0.25, schedule.time(0.5), schedule.time(2.0)
    restart = Restart(((40, 2, schedule.level(low), schedule.level(high), 1.0),))
    error = 0.1 * ONE
    chain = Chain(exact(v, schedule), [low, high], noise_fn=lambda index: 0.7 * ONE, remedies=[restart])
    link = next(chain.links())
    ready = chain.remedies[0]
    off = ready.after(chain, ONE + error, link) - ready.after(chain, ONE, link)
    factor = sqrt((v + schedule.level(low) ** 2) / (v + schedule.level(high) ** 2))
    torch.testing.assert_close(off, error * factor**2, rtol=2e-3, atol=0)
    level, spread = schedule.level(low), sqrt(schedule.level(high) ** 2 - schedule.level(low) ** 2)
    once = factor * (1 / schedule.alpha(low) + 0.7 * spread)
    twice = schedule.alpha(low) * factor * (once + 0.7 * spread)
    torch.testing.assert_close(ready.after(chain, ONE, link), twice * ONE, rtol=2e-3, atol=0)
    # and images of the right variance keep it: their fresh noise makes up for what the flow contracts
    assert factor**2 * (v + level**2 + spread**2) == pytest.approx(v + level**2)


def test_restart_acts_at_the_nearest_level_and_draws_once_for_each_repeat():
    times, drawn, calls = sampling_times(SIGMA, 8), [], []

    def noise(index):
        drawn.append(index)
        return ONE

    ready = Restart(((3, 2, 0.14, 0.3, 1.003), (4, 1, 9.0, 20.0, 1.0))).on(SIGMA, times)
    heun_steps(exact(0.25, SIGMA, calls=calls), 80 * ONE, times, noise_fn=noise, remedies=[Restart(ready.intervals)])
    nearest = [min(range(8), key=lambda n, level=level: abs(times[n] - level)) for level in (0.14, 9.0)]
    assert drawn == [6 - nearest[1], *2 * [6 - nearest[0]]]
    assert len(calls) == network_calls("heun", 8) + ready.calls == 15 + 2 * 2 * 2 + 3 * 2
    euler = Restart(ready.intervals, corrector=False).on(SIGMA, times)
    assert euler.calls == 2 * 2 + 3
    on_steps = Restart(((3, 1, 0.14, 0.3, 1.0),)).on(SCHEDULE, sampling_times(SCHEDULE, 50))
    (index, levels, *_), = on_steps.planned
    assert all(isinstance(t, int) for t in levels) and levels[0] == sampling_times(SCHEDULE, 50)[48 - index]


# -------------------------------------------------------------------------------------------------- analytic variance


def exact_gamma(v, times, schedule, pixels=None):
    return Gamma(times, [schedule.sigma(t) ** 2 / variance(t, v, schedule) for t in times], pixels)


@pytest.mark.parametrize("schedule", [SCHEDULE, SIGMA, FlowSchedule()])
@pytest.mark.parametrize("eta", [None, 0.0, 0.6, 1.0])
def test_variance_of_a_chain_with_analytic_variances_is_exact(schedule, eta):
    """Ancestral (eta None) and DDIM: Var x_j = a^2 Var x_i + v at every step, however long it is."""
    v = 0.25
    times = [schedule.time(level) for level in (0.2, 0.7, 3.0, 12.0)]
    gamma = exact_gamma(v, times, schedule)
    factors, drawn = [], []

    def noise(index):
        drawn.append(index)
        return torch.zeros_like(ONE)

    sampler, options = (ddpm_steps, {"var_type": "analytic", "clip_denoised": False}) if eta is None else (
        generalized_steps, {"eta": eta})
    factors = [x for _, x, _, _ in inputs_of(sampler, exact(v, schedule, "v_prediction"), ONE, times, gamma=gamma,
                                             noise_fn=noise, **options)]
    assert drawn == [0, 1, 2]                                           # eta 0 draws, too; the last step does not
    total, chain = variance(times[-1], v, schedule), Chain(exact(v, schedule, "v_prediction"), times)
    for link, before, after in zip(chain.links(), factors, factors[1:], strict=False):
        small = step_variances(schedule, link.i, link.j)[0]
        kept = small if eta is None else eta**2 * small
        added = analytic_variance(chain, link, gamma, kept, ONE, None)
        total = total * (after / before).flatten()[0].item() ** 2 + added
        assert total == pytest.approx(variance(link.j, v, schedule), rel=1e-9)


def test_noise_before_the_last_step_is_bounded_and_gamma_is_interpolated():
    gamma = Gamma([10, 500, 999], [0.5, 0.9, 0.999], pixels=2)
    chain = Chain(exact(0.5), [10, 500, 999])
    first, second, _ = chain.links()
    v = analytic_variance(chain, second, gamma, step_variances(SCHEDULE, 500, 10)[0], ONE, 2)
    assert v == pytest.approx((2 * 2 / 255) ** 2 * torch.pi / 2)
    assert analytic_variance(chain, first, gamma, 0.1, ONE, 2) > 0.1
    assert gamma.at(SCHEDULE, 500) == 0.9 and 0.5 < gamma.at(SCHEDULE, 100) < 0.9
    assert gamma.open_variance(SCHEDULE, 999, ONE) == min(1, SCHEDULE.level(999) ** 2 * (1 - 0.999))
    assert Gamma([1], [1.1]).open_variance(SCHEDULE, 1, ONE) == 0
    each = gamma.open_variance(SCHEDULE, torch.tensor([10, 500]), ONE)
    assert each.shape == (2, 1, 1, 1) and each[1].item() == gamma.open_variance(SCHEDULE, 500, ONE)
    for bad in (([], []), ([1], [1, 2]), ([1], [0])):
        with pytest.raises(ValueError, match="positive number for each"):
            Gamma(*bad)
    with pytest.raises(ValueError, match="measured at times 10 to 999"):
        gamma.check([0, 500])


# --------------------------------------------------------------------------------------------------- none of a remedy


NOTHING = {"dcw": [DCW(0.0, 0.0), DCW(0.0, pixel=True)], "time_shift": [TimeShift(0, 0), TimeShift(80, 1000)],
           "restart": [Restart(()), Restart(((3, 0, 0.2, 0.6, 1.0),))]}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_parameter_of_zero_is_the_plain_chain_to_the_bit(name):
    x, times = normal(6).float(), [50, 200, 400, 700]

    def run(remedies):
        return SAMPLERS[name](exact(0.5), x, times, noise_fn=lambda i: normal(i).float(), remedies=remedies)

    assert NOTHING.keys() == REMEDIES.keys()
    for remedies in ([each] for every in NOTHING.values() for each in every):
        assert torch.equal(run(remedies), run([])), remedies


@pytest.mark.parametrize(("remedy", "schedule", "message"), [
    (TimeShift(80, 300), SIGMA, "whole time steps"),
    (Restart(((1, 2, 0.2, 0.6, 1.0),)), SIGMA, "N of at least 2"),
    (Restart(((3, 2, 0.2, 0.1, 1.0),)), SIGMA, "MAX must lie above"),
    (Restart(((3, 2, 0.2, 1e4, 1.0),)), SIGMA, "up to its highest"),
    (Restart(((3, 2, 0.01, 0.01001, 1.0),)), SCHEDULE, "no time of the schedule"),
])
def test_refusals(remedy, schedule, message):
    times = [0.01, 0.2, 1.0, 5.0] if schedule is SIGMA else [0, 100, 500]
    with pytest.raises(ValueError, match=message):
        remedy.on(schedule, times)


# --------------------------------------------------------------------------------------------- entering in the middle


class Seen(Remedy):
    """What each step led to, by its index."""

    def __init__(self):
        self.found = {}

    def after(self, chain, x, link):
        self.found[link.index] = x
        return x


@pytest.mark.parametrize("sampler, options, remedies", [
    ("heun", {"churn": 2.0}, ()), ("generalized", {"eta": 0.7}, ()), ("generalized", {}, (DCW(0.05, 0.02),)),
    ("generalized", {}, (TimeShift(200, 100),)), ("generalized", {}, (Restart(((3, 2, 0.2, 9.0, 1.0),)),))])
def test_a_chain_that_is_entered_goes_on_as_the_whole_one(sampler, options, remedies):
    """Also where a step depends on the length of the list or on its highest time."""
    times, denoiser, x = sampling_times(SCHEDULE, 10), exact(0.5, SCHEDULE), normal(0)
    seen, sample = Seen(), SAMPLERS[sampler]

    def noise(index):
        return normal(1 + index)

    whole = sample(denoiser, x, times, noise_fn=noise, remedies=(*remedies, seen), **options)
    start = times[6]                                      # where the third of ten steps ends
    rest = sample(denoiser, seen.found[2], times, noise_fn=noise, remedies=remedies, start=start, **options)
    torch.testing.assert_close(rest, whole, rtol=0, atol=0)


def test_an_entry_is_a_time_of_the_list():
    with pytest.raises(ValueError, match="not in list"):
        euler_steps(exact(0.5, SCHEDULE), normal(0), [100, 500], start=300)
