"""Remedies while training, against the exact network of Gaussian data."""

import pytest
import torch

from configs.training import Loss, ScheduledSampling
from functions.denoiser import Denoiser
from functions.losses import sequence_aware_loss
from functions.schedule import FlowSchedule, SigmaSchedule
from functions.training_remedies import Rollout, ramp_up, scheduled_noise, slowed_times
from tests.functions.gaussian import SCHEDULE, exact

SCHEDULES = {"discrete": (SCHEDULE, [100, 400, 700]), "sigma": (SigmaSchedule(), [0.3, 1.0, 5.0]),
             "flow": (FlowSchedule(), [0.2, 0.5, 0.8])}


def draws(K, B, m, shape=(1, 8, 8), seed=0, v=0.25):
    g = torch.Generator().manual_seed(seed)
    x0 = v**0.5 * torch.randn(B, *shape, generator=g)
    noise, rolled = torch.randn(K, B, *shape, generator=g), torch.randn(m, K, B, *shape, generator=g)
    return x0, noise, Rollout(torch.ones(B, dtype=torch.bool), rolled)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("m", [1, 3])
def test_the_target_is_the_noise_in_expectation_for_an_exact_network(name, m):
    """And for m = 1 it differs from it by what the posterior of x_0 leaves open, which is known."""
    schedule, times = SCHEDULES[name]
    t = torch.tensor(times).repeat_interleave(2000)
    x0, noise, rollout = draws(1, len(t), m)
    found = scheduled_noise(exact(0.25, schedule, "v_prediction"), x0, t, noise, rollout)
    moved = (found - noise)[0].unflatten(0, (3, -1))                                     # (3, 2000, 1, 8, 8)
    error = moved.flatten(1).std(1) / moved[0].numel() ** 0.5
    assert (moved.flatten(1).mean(1).abs() < 4 * error).all()
    if m == 1:
        above = schedule.above(torch.tensor(times), 1)
        alpha, sigma = schedule.alpha(above), schedule.sigma(above)
        open_variance = 0.25 * sigma**2 / (alpha**2 * 0.25 + sigma**2)
        expected = (open_variance / schedule.level(torch.tensor(times)) ** 2).flatten()
        torch.testing.assert_close(moved.flatten(1).var(1), expected, rtol=0.03, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_loss_sees_the_networks_own_step_and_its_target_means_the_true_image(name):
    schedule, times = SCHEDULES[name]
    t = torch.tensor(times)
    x0, noise, rollout = draws(2, 3, 2)
    denoiser = exact(0.25, schedule, "v_prediction")
    found = scheduled_noise(denoiser, x0, t, noise, rollout)
    for k in range(2):
        lower = schedule.below(t, k)[0]
        x = schedule.add_noise(x0, rollout.noise[0, k], schedule.above(lower, 2))
        x = schedule.add_noise(denoiser(x, schedule.above(lower, 2)).x0, rollout.noise[1, k],
                               schedule.above(lower, 1))
        x = schedule.add_noise(denoiser(x, schedule.above(lower, 1)).x0, noise[k], lower)
        torch.testing.assert_close(schedule.add_noise(x0, found[k], lower), x, rtol=1e-4, atol=1e-4)
    terms = sequence_aware_loss(denoiser, x0, t, found, num_consecutive_steps=2)
    assert terms.total.isfinite().all()


def test_every_input_of_the_sequence_has_its_own_calls():
    calls, (x0, noise, rollout) = [], draws(2, 5, 3)
    scheduled_noise(exact(0.25, calls=calls), x0, torch.full((5,), 500), noise, rollout)
    loss = Loss(num_consecutive_steps=2, lamda=1.0, scheduled_sampling=ScheduledSampling(steps=3))
    assert sum(map(len, calls)) + noise[:, :, 0, 0, 0].numel() == 5 * loss.calls == 40


def test_who_takes_part():
    calls, (x0, noise, rollout) = [], draws(1, 5, 3)
    t = torch.tensor([999, 998, 500, 500, 2])
    rollout = rollout._replace(chosen=torch.tensor([True, True, True, False, True]))
    found = scheduled_noise(exact(0.25, calls=calls), x0, t, noise, rollout, min_level=0.05)
    same = (found == noise).flatten(2).all(2)[0]
    assert same.tolist() == [True, False, False, True, True]          # none above; one above; m above; not chosen; low
    assert [each.tolist() for each in calls] == [[999, 999, 503, 503, 5], [999, 999, 502, 502, 4],
                                                 [999, 999, 501, 501, 3]]
    x = SCHEDULE.add_noise(x0[1:2], rollout.noise[0, 0, 1:2], torch.tensor([999]))        # starts where there is a time
    x = SCHEDULE.add_noise(exact(0.25)(x, 999).x0, noise[0, 1:2], torch.tensor([998]))
    torch.testing.assert_close(SCHEDULE.add_noise(x0[1:2], found[0, 1:2], t[1:2]), x, rtol=1e-4, atol=1e-4)


def test_no_gradient_flows_through_the_rollout():
    weight = torch.ones((), requires_grad=True)
    x0, noise, rollout = draws(1, 2, 1)
    found = scheduled_noise(Denoiser(lambda x, t: weight * x, SCHEDULE), x0, torch.tensor([100, 500]), noise, rollout)
    assert not found.requires_grad


def test_the_probability_rises_over_the_ramp():
    assert [ramp_up(0.8, 1.0, p) for p in (0.0, 0.5, 1.0)] == [0.0, 0.4, 0.8]
    assert [ramp_up(0.8, 0.25, p) for p in (0.125, 0.5)] == [0.4, 0.8] and ramp_up(0.8, 0.0, 0.0) == 0.8


@pytest.mark.parametrize("name", SCHEDULES)
def test_slowed_times_lie_between_the_time_told_and_the_share_of_it(name):
    schedule, times = SCHEDULES[name]
    t = torch.tensor(times)
    for u in (0.0, 0.37, 1.0):
        shown = slowed_times(schedule, t, torch.full((3,), u, dtype=torch.float64), 0.8)
        tau = 1 - schedule.rank(t)
        torch.testing.assert_close(1 - schedule.rank(shown), tau * (1 - 0.8 * u), rtol=0, atol=0.0011)
        assert (shown >= t).all()
    assert torch.equal(slowed_times(schedule, t, torch.rand(3).double(), 0.0), t)


def test_a_velocity_told_one_time_and_shown_another_keeps_its_target():
    """An image of x_0 and n at the later time, whose velocity is the same all along the line."""
    schedule, calls = FlowSchedule(), []
    x0, noise, _ = draws(1, 3, 1)
    t, later = torch.tensor([0.2, 0.5, 0.8]), torch.tensor([0.4, 0.5, 0.9])

    def network(x, told):
        calls.append((x, told))
        return noise[0] - x0

    terms = sequence_aware_loss(Denoiser(network, schedule, "flow"), x0, t, noise, lamda=0, shown=lambda times: later)
    assert terms.base.abs().max() == 0 and torch.equal(calls[0][1], t)
    torch.testing.assert_close(calls[0][0], schedule.add_noise(x0, noise[0], later))
