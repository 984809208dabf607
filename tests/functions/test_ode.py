"""Deterministic samplers on Gaussian data, where the flow is known: x scales with its standard deviation."""

from math import inf, log2, sqrt

import pytest
import torch

from functions.chain import Chain
from functions.denoiser import Denoiser
from functions.denoising import SAMPLERS, generalized_steps, network_calls
from functions.ode import Churn, add_churn, check_churn, ddim_inversion, euler_steps, heun_steps
from functions.schedule import FlowSchedule, SigmaSchedule
from functions.timesteps import level_times, sampling_times
from tests.functions.gaussian import SCHEDULE, exact, variance

ONE = torch.ones(1, 1, 1, 1, dtype=torch.float64)


def exact_flow(x, v, i, j):
    return x * sqrt(variance(j, v) / variance(i, v))


def slopes(errors):
    return [log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]


def errors_at_the_lowest_step(sampler, counts=(20, 40, 80), v=0.25):
    errors = []
    for count in counts:
        inputs = []
        sampler(exact(v), ONE, sampling_times(SCHEDULE, count, "linspace"),
                callback=lambda index, t, x, x0, eps, inputs=inputs: inputs.append(x))
        errors.append(abs(inputs[-1] - exact_flow(ONE, v, 999, 0)).item())
    return errors


def test_heun_is_of_second_order():
    assert all(1.9 <= slope <= 2.1 for slope in slopes(errors_at_the_lowest_step(heun_steps)))


def test_euler_is_of_first_order():
    assert all(0.95 <= slope <= 1.05 for slope in slopes(errors_at_the_lowest_step(euler_steps)))


def test_dpmpp_2m_reaches_second_order():
    assert all(1.9 <= slope <= 2.1 for slope in slopes(errors_at_the_lowest_step(SAMPLERS["dpmpp_2m"], (40, 80, 160))))


def test_euler_is_ddim():
    steps = sampling_times(SCHEDULE, 15)
    ddim = generalized_steps(exact(0.5), ONE, steps)
    torch.testing.assert_close(euler_steps(exact(0.5), ONE, steps), ddim, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("count", [5, 20])
def test_dpmpp_2m_is_that_of_diffusers(count):
    scheduler = pytest.importorskip("diffusers").DPMSolverMultistepScheduler(
        trained_betas=torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).numpy(), algorithm_type="dpmsolver++",
        solver_order=2, final_sigmas_type="zero")
    steps = sampling_times(SCHEDULE, count, "linspace")
    scheduler.set_timesteps(timesteps=steps[::-1])

    def network(x, t):                                          # not linear in x, so that nothing cancels
        return torch.tanh(2 * x) + t.view(-1, 1, 1, 1) / 1000

    x = start = torch.randn((2, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(2)), t, x).prev_sample
    ours = SAMPLERS["dpmpp_2m"](Denoiser(network, SCHEDULE), start, steps)
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-4 * x.abs().mean().item())


@pytest.mark.parametrize("name", SAMPLERS)
def test_network_calls_are_counted(name):
    calls = []
    SAMPLERS[name](exact(1.0, calls=calls), ONE, [0, 100, 500, 999], noise_fn=lambda i: ONE)
    assert len(calls) == network_calls(name, 4)


@pytest.mark.parametrize("times", [[1.0], [0.2, 0.5, 1.0]])
@pytest.mark.parametrize("name", ["heun", "euler"])
def test_network_calls_are_counted_from_noise_alone(name, times):
    calls = []

    def network(x, t):
        calls.append(t)
        return x

    SAMPLERS[name](Denoiser(network, FlowSchedule(), "flow"), ONE, times)
    assert len(calls) == network_calls(name, len(times), from_noise_alone=True)


def test_each_evaluation_of_heun_is_divided_by_the_scale_of_its_level():
    calls, scales = [], {900: 1.2, 500: 1.1, 0: 1.0}

    class Wrong(Denoiser):
        def raw(self, x, t):
            calls.append(t)
            return scales[t] * exact(0.3).raw(x, t)

    scaled = heun_steps(Wrong(None, SCHEDULE), ONE, [0, 500, 900], eps_scaler=(0.1, 1.0))
    assert calls == [900, 500, 500, 0, 0]
    torch.testing.assert_close(scaled, heun_steps(exact(0.3), ONE, [0, 500, 900]))


def churned(schedule, t, churn, steps=10, noise_fn=None):
    """One step of a chain of ``steps`` steps that starts at time t."""
    chain = Chain(Denoiser(None, schedule, "v_prediction"), [t * (n + 1) / steps for n in range(steps)]
                  if not hasattr(schedule, "num_timesteps") else [*range(1, steps), t], noise_fn=noise_fn)
    return add_churn(chain, ONE, next(chain.links()), churn)


def test_churn_raises_to_the_level_of_a_step_or_to_any_level():
    noise = torch.full_like(ONE, 0.5)
    for schedule, t, exactly in ((SCHEDULE, 500, 0.01), (SigmaSchedule(), 3.0, 1e-12), (FlowSchedule(), 0.6, 1e-12)):
        level = schedule.level(t)
        x, raised = churned(schedule, t, Churn(2.0, s_noise=1.1), noise_fn=lambda index: noise)
        assert schedule.level(raised) == pytest.approx(1.2 * level, rel=exactly)
        added = sqrt(schedule.level(raised) ** 2 - level**2) * 1.1 * 0.5
        torch.testing.assert_close(x / schedule.alpha(raised), ONE / schedule.alpha(t) + added)
    for churn in (Churn(), Churn(2.0, s_min=1e3), Churn(2.0, s_max=1e-3), Churn(1e-6)):
        assert churned(SCHEDULE, 500, churn) == (ONE, 500)                           # nothing drawn


def test_churn_keeps_the_variance():
    """Noise that is added and removed again leaves the marginals."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 1, 16, 16, generator=generator, dtype=torch.float64)
    steps, noise = sampling_times(SCHEDULE, 120, "linspace"), []

    def draw(index):
        noise.append(index)
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    out = heun_steps(exact(0.25), x, steps, churn=20.0, noise_fn=draw)
    assert len(noise) > 0.9 * len(steps)
    assert out.var().item() / 0.25 == pytest.approx(1, abs=0.015 + 4 * sqrt(2 / x.numel()))
    with pytest.raises(ValueError, match="noise_fn"):
        heun_steps(exact(0.25), x, steps, churn=20.0)


@pytest.mark.parametrize(("churn", "message"), [
    ((1, 2, 1), "s_min at most"), (-1, "at least 0"), ((1,) * 5, "4 numbers"), (float("nan"), "at least 0"),
    ((1, 0, inf, inf), "finite")])
def test_refused_churn(churn, message):
    assert check_churn(40) == Churn(40, 0, inf, 1)
    with pytest.raises(ValueError, match=message):
        check_churn(churn)


@pytest.mark.parametrize("v", [0.25, 1.0])
def test_inversion_is_of_first_order_and_decodes_to_the_image(v):
    latent_errors, image_errors = [], []
    for count in (40, 80, 160):
        steps = sampling_times(SCHEDULE, count, "linspace")
        latent = ddim_inversion(exact(v), ONE, steps)
        latent_errors.append(abs(latent - exact_flow(ONE, v, -1, 999)).item())
        image_errors.append(abs(generalized_steps(exact(v), latent, steps) - ONE).item())
    assert all(0.95 <= slope <= 1.05 for slope in slopes(latent_errors) + slopes(image_errors))


def test_inversion_with_one_noise_for_all_levels_is_exact():
    """Where the network returns the same e at every level, the flow is a straight line."""
    noise = torch.randn((2, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0, steps = torch.linspace(-1, 1, 32, dtype=torch.float64).view(2, 1, 4, 4), [0, 300, 999]
    latent = ddim_inversion(Denoiser(lambda x, t: 1.5 * noise, SCHEDULE), x0, steps, eps_scaler=1.5)
    torch.testing.assert_close(latent, SCHEDULE.alpha(999) * x0 + SCHEDULE.sigma(999) * noise)


def test_rho_steps_are_edms_levels():
    steps = level_times(SCHEDULE, 18)
    low, high = SCHEDULE.level(0), SCHEDULE.level(999)
    for i, t in enumerate(steps):
        level = (low ** (1 / 7) + i / 17 * (high ** (1 / 7) - low ** (1 / 7))) ** 7
        neighbours = [s for s in (t - 1, t + 1) if 0 <= s < 1000]
        assert all(abs(SCHEDULE.level(t) - level) <= abs(SCHEDULE.level(s) - level) for s in neighbours)
    assert (steps[0], steps[-1], len(steps)) == (0, 999, 18)
    assert sampling_times(SCHEDULE, "18", "edm") == steps
    assert len(level_times(SCHEDULE, 1000)) < 1000 and level_times(SCHEDULE, 1) == [999]
    on_levels = sampling_times(SigmaSchedule(), 18)
    assert on_levels == pytest.approx([(0.002 ** (1 / 7) + i / 17 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
                                       for i in range(18)], rel=1e-12)
    assert sampling_times(SigmaSchedule(), 1) == pytest.approx([80.0])
