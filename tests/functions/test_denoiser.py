"""Every prediction is the same chain, guidance is what its formula says, a condition reaches the rows it belongs to."""

from math import sqrt

import pytest
import torch
from torch import nn

from configs.schema import Config
from functions.denoiser import Denoiser
from functions.denoising import SAMPLERS, generalized_steps
from functions.losses import sequence_aware_loss
from functions.preconditioning import PRECONDITIONERS
from functions.prediction import PREDICTIONS, answer_of_x0
from functions.schedule import FlowSchedule, SigmaSchedule
from functions.timesteps import sampling_times
from tests.functions.gaussian import SCHEDULE, exact

SCHEDULES = {"discrete": SCHEDULE, "sigma": SigmaSchedule(), "flow": FlowSchedule()}


def normal(seed, shape=(2, 3, 4, 4), dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", PREDICTIONS)
def test_an_estimate_inverts_its_target(schedule, name):
    kind, x0, eps = PREDICTIONS[name], normal(0), normal(1)
    for t in (schedule.at(torch.tensor([0.3, 0.9], dtype=torch.float64)), schedule.at(torch.tensor([0.5]))[0].item()):
        alpha, sigma = schedule.alpha(t, torch.float64), schedule.sigma(t, torch.float64)
        x = alpha * x0 + sigma * eps
        found = kind.read(schedule, x, t, kind.target(schedule, x0, eps, t))
        torch.testing.assert_close(found.x0, x0, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.eps, eps, rtol=1e-5, atol=1e-5)
        assert found.variance is None
        both = kind.read(schedule, x, t, torch.cat([kind.target(schedule, x0, eps, t), torch.zeros_like(x)], 1))
        assert torch.equal(both.x0, found.x0)
        if name not in PRECONDITIONERS:                        # EDM reads no variances
            assert torch.equal(both.variance, torch.full_like(x, 0.5))


def test_how_x0_answers_the_output():
    t = torch.tensor([100, 700])
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    for name, expected in (("epsilon", -sigma / alpha), ("v_prediction", -sigma), ("sample", torch.ones_like(alpha)),
                           ("flow", -sigma / (alpha + sigma))):
        torch.testing.assert_close(answer_of_x0(PREDICTIONS[name], SCHEDULE, t), expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_prediction_gives_the_same_chain(sampler):
    x, draws = normal(0), [normal(i + 1) for i in range(12)]
    times = sampling_times(SCHEDULE, 12, "linspace")
    chains = [SAMPLERS[sampler](exact(0.25, prediction=name), x, times, noise_fn=draws.__getitem__)
              for name in PREDICTIONS]
    for other in chains[1:]:
        torch.testing.assert_close(other, chains[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_agrees_between_steps_and_continuous_levels(eta):
    """y = x / alpha on the levels of the steps is the same chain."""
    times, draws = sampling_times(SCHEDULE, 15, "linspace"), [normal(i + 1) for i in range(15)]
    levels, x = [SCHEDULE.level(t) for t in times], normal(0)
    on_steps = generalized_steps(exact(0.25), x, times, eta=eta, noise_fn=draws.__getitem__)
    y = x / SCHEDULE.alpha(times[-1])
    scale = iter([1 / SCHEDULE.alpha(t) for t in [*times[-2::-1], -1]])
    on_levels = generalized_steps(exact(0.25, SigmaSchedule()), y, levels, eta=0.0) if eta == 0 else None
    if eta == 0:
        torch.testing.assert_close(on_levels, on_steps, rtol=1e-10, atol=1e-10)
    else:                                                       # the posterior variance of y is that of x over alpha^2
        for i, j in zip(times[::-1], times[-2::-1], strict=False):
            s = eta * SCHEDULE.sigma(j) * sqrt(1 - (SCHEDULE.level(j) / SCHEDULE.level(i)) ** 2)
            assert s * next(scale) == pytest.approx(
                eta * SCHEDULE.level(j) * sqrt(1 - (SCHEDULE.level(j) / SCHEDULE.level(i)) ** 2), rel=1e-12)


@pytest.mark.parametrize("name", ["generalized", "euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_chains_of_every_schedule_give_gaussian_data(name, schedule):
    """The exact flow scales the prior to the standard deviation of the data; start as noise of the first time."""
    prediction = "flow" if isinstance(schedule, FlowSchedule) else "epsilon"
    times = sampling_times(schedule, 200)
    x = normal(0, (1, 1, 64, 64)) * schedule.prior_std(times[-1])
    out = SAMPLERS[name](exact(0.25, schedule, prediction), x, times)
    assert (out.std() / x.std() * schedule.prior_std(times[-1])).item() == pytest.approx(0.5, rel=0.03)


def test_samplers_start_from_pure_noise_where_the_prediction_can():
    flow = FlowSchedule()
    for name, sampler in SAMPLERS.items():
        out = sampler(exact(0.25, flow, "flow"), normal(0), [0.25, 0.5, 1.0], noise_fn=lambda i: normal(i))
        assert torch.isfinite(out).all(), name
    with pytest.raises(ValueError, match="v_prediction"):
        generalized_steps(Denoiser(lambda x, t: x, flow), normal(0), [0.5, 1.0])


def test_scaling_by_one_and_no_scaling_at_pure_noise():
    flow = FlowSchedule()
    net = exact(0.25, flow, "flow")
    plain = generalized_steps(net, normal(0), [0.5, 1.0])
    assert torch.equal(generalized_steps(net, normal(0), [0.5, 1.0], eps_scaler=(0.0, 1.0)), plain)
    only_first = generalized_steps(net, normal(0), [0.5, 1.0], eps_scaler=(0.1, 1.0))       # lambda: 1 at 0.5, 1.1 at 1
    assert torch.equal(only_first, plain)


class Conditional(nn.Module):
    """Adds a bias by label to a linear map; notes what it is given."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
        self.seen = []

    def forward(self, x, t, labels):
        self.seen.append((x.dtype, t.clone(), labels.clone()))
        bias = torch.where(labels >= 0, self.bias[labels], 0) * (1 + t / 1e3)
        return 0.3 * x + bias.view(-1, 1, 1, 1)


def test_guidance_of_scale_one_is_none_to_the_bit_and_others_extrapolate():
    network, labels, none = Conditional(), torch.tensor([2, 0]), torch.tensor([-1, -1])
    denoiser = Denoiser(network, SCHEDULE)
    given, free = denoiser.given({"labels": labels}), denoiser.given({"labels": none})
    x = normal(0, dtype=torch.float32)
    plain = generalized_steps(given, x, [10, 400, 900])
    assert torch.equal(generalized_steps(given.guided(free, 1.0), x, [10, 400, 900]), plain)
    a, b, c = given(x, 400), free(x, 400), given.guided(free, 3.0)(x, 400)
    torch.testing.assert_close(c.eps, b.eps + 3 * (a.eps - b.eps))
    torch.testing.assert_close(c.x0, (x - SCHEDULE.sigma(400) * c.eps) / SCHEDULE.alpha(400), rtol=1e-4, atol=1e-5)


def test_guidance_acts_inside_its_interval_of_levels_only():
    network, x = Conditional(), normal(0, dtype=torch.float32)
    given = Denoiser(network, SCHEDULE, condition={"labels": torch.tensor([1, 1])})
    free = given.given({"labels": torch.tensor([-1, -1])})
    interval = SCHEDULE.level(300), SCHEDULE.level(600)
    guided = given.guided(free, 2.0, interval)
    for t, inside in ((300, False), (301, True), (600, True), (601, False)):
        assert torch.equal(guided(x, t).eps, given(x, t).eps) != inside
    mixed = guided(x, torch.tensor([600, 601])).eps
    assert torch.equal(mixed[1], given(x, 601).eps[1]) and not torch.equal(mixed[0], given(x, 600).eps[0])


def test_condition_rows_are_repeated_for_the_consecutive_steps_and_the_gradient_is_that_of_separate_calls():
    K, B = 3, 2
    x0, noise = normal(0, dtype=torch.float32), normal(1, (K, B, 3, 4, 4), torch.float32)
    t, labels = torch.tensor([50, 800]), torch.tensor([2, -1])
    together = Conditional()
    terms = sequence_aware_loss(Denoiser(together, SCHEDULE, condition={"labels": labels}), x0, t, noise,
                                num_consecutive_steps=K, lamda=0.7)
    terms.total.mean().backward()
    assert len(together.seen) == 1 and together.seen[0][2].tolist() == [2, -1] * K
    apart = Conditional()
    errors = [noise[k] - apart(SCHEDULE.add_noise(x0, noise[k], t - k), t - k, labels) for k in range(K)]
    total = errors[0].square().flatten(1).sum(1) + 0.7 * sum(errors).square().flatten(1).sum(1) / K**2
    total.mean().backward()
    torch.testing.assert_close(terms.total, total)
    torch.testing.assert_close(together.bias.grad, apart.bias.grad)


def test_types_a_module_sees_its_own_a_function_that_of_x():
    network = Conditional()
    out = Denoiser(network, SCHEDULE, condition={"labels": torch.tensor([0, 1])})(normal(0), 5)
    assert network.seen[0][0] == torch.float32 and out.x0.dtype == out.eps.dtype == torch.float64
    assert network.seen[0][1].tolist() == [5.0, 5.0] and network.seen[0][1].dtype == torch.float32
    seen = []
    Denoiser(lambda x, t: seen.append(x.dtype) or x, SCHEDULE)(normal(0), 5)
    assert seen == [torch.float64]


def test_time_factors_of_built_networks():
    def config(**diffusion):
        return Config(data={"dataset": "DIGITS", "image_size": 8, "channels": 3}, model={"ch_mult": [1]},
                      diffusion=diffusion, loss={"num_consecutive_steps": 1}, training={"sample_timesteps": 5})

    told = []

    def network(x, t):
        told.append(t[0].item())
        return x

    for settings, t in (({"num_diffusion_timesteps": 100}, 50),
                        ({"num_diffusion_timesteps": 100, "rescale_timesteps": True}, 50),
                        ({"schedule": "flow", "prediction": "flow"}, 0.5), ({"schedule": "sigma"}, 0.5)):
        Denoiser.of(config(**settings), network)(normal(0), t)
    assert told == [50, 500, 500, 0.5]


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 3, 4, 5), (1, 3, 4, 4), (2, 9, 4, 4)])
def test_output_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"network gives .* must give \(2, 3, 4, 4\)"):
        Denoiser(lambda x, t: torch.zeros(shape), SCHEDULE)(normal(0), 5)


def test_unknown_prediction():
    with pytest.raises(ValueError, match="known: edm, epsilon, flow, iddpm, sample, v_prediction, ve, vp"):
        Denoiser(lambda x, t: x, SCHEDULE, "eps")
