import math

import pytest
import torch

from functions.denoiser import Denoiser
from functions.denoising import SAMPLERS, VAR_TYPES, ddpm_steps, generalized_steps, step_variances
from functions.remedies import TimeShift
from functions.schedule import FlowSchedule
from functions.timesteps import sampling_times
from tests.functions.gaussian import SCHEDULE, exact


def normal(seed, shape=(64, 1, 32, 32)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("index", range(3))
def test_golden(golden, golden_unet, index):
    case = golden("sampling")[index]
    options = {"eta": case["eta"]} if case["sample_type"] == "generalized" else {}
    out = SAMPLERS[case["sample_type"]](Denoiser(golden_unet, SCHEDULE), case["x"], case["timesteps"],
                                        noise_fn=lambda i: case["noise"][i], **options)
    assert (out - case["out"]).abs().max() <= 1e-4 * case["out"].abs().mean()


@pytest.mark.parametrize("timesteps", [[999], [0, 999], list(range(0, 1000, 100))])
def test_ddim_with_an_oracle_returns_x0(timesteps):
    x0 = normal(1, (2, 3, 8, 8))
    start = SCHEDULE.add_noise(x0, normal(2, (2, 3, 8, 8)), torch.full((2,), timesteps[-1]))

    def oracle(x, t):
        return (x - SCHEDULE.alpha(t) * x0) / SCHEDULE.sigma(t)

    torch.testing.assert_close(generalized_steps(Denoiser(oracle, SCHEDULE), start, timesteps), x0, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("variance", "var_type", "ratio"), [
    (1.0, "fixedlarge", 0.9999), (1.0, "fixedsmall", 0.92), (0.25, "fixedlarge", 1.034)])
def test_variance_of_the_ancestral_chain_on_gaussian_data(variance, var_type, ratio):
    out = ddpm_steps(exact(variance), normal(0), sampling_times(SCHEDULE, 100), var_type=var_type,
                     clip_denoised=False, noise_fn=lambda i: normal(i + 1))
    standard_error = math.sqrt(2 / out.numel())
    assert out.var().item() / variance == pytest.approx(ratio, abs=0.002 + 4 * standard_error)


def test_eta_one_has_the_variance_of_fixedsmall():
    """maths.md: eta = 1 is the posterior variance; without clipping both samplers then are the same chain."""
    x, steps, net = normal(0, (2, 3, 4, 4)), sampling_times(SCHEDULE, 20), exact(0.5)

    def noise(i):
        return normal(i + 1, (2, 3, 4, 4))

    a = generalized_steps(net, x, steps, eta=1.0, noise_fn=noise)
    b = ddpm_steps(net, x, steps, var_type="fixedsmall", clip_denoised=False, noise_fn=noise)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", [generalized_steps, ddpm_steps])
def test_noise_is_drawn_once_for_each_step_but_the_last(sampler):
    drawn, options = [], {"eta": 0.5} if sampler is generalized_steps else {}

    def noise(i):
        drawn.append(i)
        return torch.zeros(1, 1, 2, 2)

    sampler(exact(1.0), torch.ones(1, 1, 2, 2), [0, 10, 20, 30], noise_fn=noise, **options)
    assert drawn == [0, 1, 2]


class Scaled(Denoiser):
    """The exact network of v = 0.5 with its eps divided by a number for each time."""

    def __init__(self, divisors):
        super().__init__(None, SCHEDULE)
        self.divisors, self.net = divisors, exact(0.5)

    def raw(self, x, t):
        return self.net.raw(x, t) / self.divisors[t]


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_epsilon_scaling_divides_and_one_changes_nothing(sampler):
    x, steps = normal(0, (2, 1, 4, 4)), [100, 400, 700]
    net, zeros = exact(0.5), lambda i: torch.zeros(2, 1, 4, 4)
    plain = sampler(net, x, steps, noise_fn=zeros)
    assert torch.equal(sampler(net, x, steps, noise_fn=zeros, eps_scaler=1.0), plain)
    assert torch.equal(sampler(net, x, steps, noise_fn=zeros, eps_scaler=(0.0, 1.0)), plain)
    divisors = {700: 1.2, 400: 1.1, 100: 1.0}                          # 0.1 i + 1, i = 0 at the lowest noise
    by_hand = sampler(Scaled(divisors), x, steps, noise_fn=zeros)
    assert torch.equal(sampler(net, x, steps, noise_fn=zeros, eps_scaler=(0.1, 1.0)), by_hand)


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_clipping_bounds_the_estimate_and_the_callback_sees_the_chain(sampler):
    seen = []
    out = sampler(exact(4.0), 3 * normal(0, (2, 1, 4, 4)), [0, 500, 999], clip_denoised=True,
                  noise_fn=lambda i: torch.zeros(2, 1, 4, 4), callback=lambda *args: seen.append(args))
    assert [(i, t) for i, t, *_ in seen] == [(0, 999), (1, 500), (2, 0)]
    assert all(x0.abs().max() <= 1 for _, _, _, x0, _ in seen)
    torch.testing.assert_close(out, seen[-1][3], rtol=1e-6, atol=0)                # the last estimate is the sample


def test_step_variances_are_those_of_ddpm():
    """b = 1 - abar_i / abar_j, and b (1 - abar_j) / (1 - abar_i)."""
    for i, j in ((999, 500), (100, 99), (3, -1)):
        b = 1 - (SCHEDULE.alpha(i) / SCHEDULE.alpha(j)) ** 2
        small, large = step_variances(SCHEDULE, i, j)
        assert large == pytest.approx(b, rel=1e-10)
        assert small == pytest.approx(b * SCHEDULE.sigma(j) ** 2 / SCHEDULE.sigma(i) ** 2, rel=1e-10)


def learned(net, v):
    """The same network, which also gives v everywhere."""
    class Learned(Denoiser):
        def raw(self, x, t):
            return torch.cat([net.raw(x, t), torch.full_like(x, 2 * v - 1)], 1)

    return Learned(None, SCHEDULE)


@pytest.mark.parametrize(("v", "fixed"), [(1.0, "fixedlarge"), (0.0, "fixedsmall")])
def test_a_learned_variance_at_either_end_is_the_fixed_one(v, fixed):
    x, net = normal(0, (2, 3, 4, 4)), exact(0.5)

    def run(denoiser, var_type):
        return ddpm_steps(denoiser, x, [0, 50, 700, 999], var_type=var_type,
                          noise_fn=lambda i: normal(i + 1, (2, 3, 4, 4)))

    torch.testing.assert_close(run(learned(net, v), "learned"), run(net, fixed))


@pytest.mark.parametrize("var_type", ["fixedlarge", "learned"])
def test_a_shifted_time_leaves_the_variance_of_the_last_step_to_the_list(var_type):
    """An image that counts as one of a time above the whole list: guided or not, it differs by the smallest variance
    of the step before, not by a negative one."""
    x, told = 3 * normal(0, (2, 3, 4, 4)).double(), []

    def gradient(x, t):
        told.append(t)
        return torch.full_like(x, 0.3 * isinstance(t, torch.Tensor))                          # on the last step alone

    plain, guided = (ddpm_steps(learned(exact(0.5), 0.0), x, [20, 60], var_type=var_type, clip_denoised=False,
                                noise_fn=lambda i: x, remedies=[TimeShift(200, 0)], gradient=each)
                     for each in (None, gradient))
    assert len(told) == 2 and (told[1] > 60).all()
    torch.testing.assert_close(guided - plain, torch.full_like(x, 0.3 * step_variances(SCHEDULE, 60, 20)[0]))


def test_a_classifiers_gradient_moves_the_mean_by_the_variance_and_ddims_eps_by_sigma():
    """Data N(0, v) and log p(y|x_t) linear with slope g: the exact chain of the shifted posterior mean is known."""
    x, net, g = normal(0, (2, 3, 4, 4)).double(), exact(0.5), 0.3
    gradient = lambda x, t: torch.full_like(x, g)                                             # noqa: E731
    plain = ddpm_steps(net, x, [500], var_type="fixedlarge", clip_denoised=False)
    guided = ddpm_steps(net, x, [500], var_type="fixedlarge", clip_denoised=False, gradient=gradient)
    torch.testing.assert_close(guided - plain, torch.full_like(x, g * step_variances(SCHEDULE, 500, -1)[1]))
    plain, guided = (ddpm_steps(net, x, [20, 500], clip_denoised=False, gradient=each, noise_fn=lambda index: x)
                     for each in (None, lambda x, t: torch.full_like(x, g * (t == 20))))        # on the last step alone
    torch.testing.assert_close(guided - plain, torch.full_like(x, g * step_variances(SCHEDULE, 500, 20)[0]))
    plain, guided = (generalized_steps(net, x, [500], gradient=each) for each in (None, gradient))
    shift = SCHEDULE.sigma(500) ** 2 / SCHEDULE.alpha(500) * g                                # x0' + sigma^2/alpha s g
    torch.testing.assert_close(guided - plain, torch.full_like(x, shift))
    assert sorted(VAR_TYPES) == ["analytic", "fixedlarge", "fixedsmall", "learned"]


def test_times_are_float32_of_the_batch():
    def check(x, t):
        assert t.dtype == torch.float32 and t.shape == (3,)
        return x

    generalized_steps(Denoiser(check, SCHEDULE), normal(0, (3, 1, 2, 2)), [5, 9])


@pytest.mark.parametrize(("sampler", "change", "message"), [
    (generalized_steps, {"eta": 1.5}, r"eta 1.5 is not in \[0, 1\]"),
    (generalized_steps, {"eta": 0.5}, "give noise_fn"),
    (ddpm_steps, {}, "give noise_fn"),
    (ddpm_steps, {"var_type": "small"}, "analytic, fixedlarge, fixedsmall, learned"),
    (ddpm_steps, {"var_type": "learned"}, "gives no variances"),
    (generalized_steps, {"timesteps": [5, 5]}, "ascending"),
    (generalized_steps, {"timesteps": []}, "non-empty"),
    (generalized_steps, {"timesteps": [1000]}, r"\[0, 1000\)"),
    (generalized_steps, {"eps_scaler": (-0.1, 0.1)}, "above 0"),
])
def test_refusals(sampler, change, message):
    steps = change.pop("timesteps", [0, 500])
    with pytest.raises(ValueError, match=message):
        sampler(exact(1.0), normal(0, (1, 1, 2, 2)), steps, **change)


@pytest.mark.parametrize("sampler", ["generalized", "heun", "euler", "dpmpp_2m"])
def test_a_classifier_moves_nothing_where_no_image_follows_from_the_noise(sampler):
    schedule = FlowSchedule()                                                   # whose list begins at alpha = 0
    net, x = exact(0.5, schedule, "v_prediction"), torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    plain, guided = (SAMPLERS[sampler](net, x, [0.3, 0.6, 1.0], gradient=gradient)
                     for gradient in (None, lambda x, t: torch.zeros_like(x)))
    torch.testing.assert_close(guided, plain, rtol=0, atol=1e-6)
