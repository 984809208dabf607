import math

import pytest
import torch

from functions.denoising import SAMPLERS, ddpm_steps, generalized_steps
from functions.schedule import NoiseSchedule
from functions.timesteps import sampling_timesteps

SCHEDULE = NoiseSchedule(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))


def gaussian_network(variance):
    """The exact eps of data N(0, variance I)."""
    def eps(x, t):
        abar = SCHEDULE.alpha_bar(t.long())
        return x * (1 - abar).sqrt() / (abar * variance + 1 - abar)
    return eps


def normal(seed, shape=(64, 1, 32, 32)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("index", range(4))
def test_golden(golden, golden_unet, index):
    case = golden("sampling")[index]
    options = {"eta": case["eta"]} if case["sample_type"] == "generalized" else {}
    out = SAMPLERS[case["sample_type"]](golden_unet, SCHEDULE, case["x"], case["timesteps"],
                                        noise_fn=lambda i: case["noise"][i], **options)
    assert (out - case["out"]).abs().max() <= 1e-4 * case["out"].abs().mean()


@pytest.mark.parametrize("timesteps", [[999], [0, 999], list(range(0, 1000, 100))])
def test_ddim_with_an_oracle_returns_x0(timesteps):
    x0 = normal(1, (2, 3, 8, 8))
    start = SCHEDULE.add_noise(x0, normal(2, (2, 3, 8, 8)), torch.full((2,), timesteps[-1]))

    def oracle(x, t):
        abar = SCHEDULE.alpha_bar(t.long()).double()
        return ((x - abar.sqrt() * x0) / (1 - abar).sqrt()).float()

    torch.testing.assert_close(generalized_steps(oracle, SCHEDULE, start, timesteps), x0, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("variance", "var_type", "ratio"), [
    (1.0, "fixedlarge", 0.9999), (1.0, "fixedsmall", 0.92), (0.25, "fixedlarge", 1.034)])
def test_variance_of_the_ancestral_chain_on_gaussian_data(variance, var_type, ratio):
    out = ddpm_steps(gaussian_network(variance), SCHEDULE, normal(0), sampling_timesteps(1000, 100), var_type=var_type,
                     clip_denoised=False, noise_fn=lambda i: normal(i + 1))
    standard_error = math.sqrt(2 / out.numel())
    assert out.var().item() / variance == pytest.approx(ratio, abs=0.002 + 4 * standard_error)


def test_eta_one_has_the_variance_of_fixedsmall():
    """maths.md: eta = 1 is the posterior variance; without clipping both samplers then are the same chain."""
    x, steps, net = normal(0, (2, 3, 4, 4)), sampling_timesteps(1000, 20), gaussian_network(0.5)

    def noise(i):
        return normal(i + 1, (2, 3, 4, 4))

    a = generalized_steps(net, SCHEDULE, x, steps, eta=1.0, noise_fn=noise)
    b = ddpm_steps(net, SCHEDULE, x, steps, var_type="fixedsmall", clip_denoised=False, noise_fn=noise)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", [generalized_steps, ddpm_steps])
def test_noise_is_drawn_once_for_each_step_but_the_last(sampler):
    drawn, options = [], {"eta": 0.5} if sampler is generalized_steps else {}

    def noise(i):
        drawn.append(i)
        return torch.zeros(1, 1, 2, 2)

    sampler(gaussian_network(1.0), SCHEDULE, torch.ones(1, 1, 2, 2), [0, 10, 20, 30], noise_fn=noise, **options)
    assert drawn == [0, 1, 2]


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_epsilon_scaling_divides_and_one_changes_nothing(sampler):
    x, steps = normal(0, (2, 1, 4, 4)), [100, 400, 700]
    net, zeros = gaussian_network(0.5), lambda i: torch.zeros(2, 1, 4, 4)
    plain = sampler(net, SCHEDULE, x, steps, noise_fn=zeros)
    assert torch.equal(sampler(net, SCHEDULE, x, steps, noise_fn=zeros, eps_scaler=1.0), plain)
    assert torch.equal(sampler(net, SCHEDULE, x, steps, noise_fn=zeros, eps_scaler=(0.0, 1.0)), plain)
    divisors = {700.0: 1.2, 400.0: 1.1, 100.0: 1.0}                          # 0.1 i + 1, i = 0 at the lowest noise
    by_hand = sampler(lambda x, t: net(x, t) / divisors[t[0].item()], SCHEDULE, x, steps, noise_fn=zeros)
    assert torch.equal(sampler(net, SCHEDULE, x, steps, noise_fn=zeros, eps_scaler=(0.1, 1.0)), by_hand)


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_clipping_bounds_the_estimate_and_the_callback_sees_the_chain(sampler):
    seen = []
    out = sampler(gaussian_network(4.0), SCHEDULE, 3 * normal(0, (2, 1, 4, 4)), [0, 500, 999], clip_denoised=True,
                  noise_fn=lambda i: torch.zeros(2, 1, 4, 4), callback=lambda *args: seen.append(args))
    assert [(i, t) for i, t, *_ in seen] == [(0, 999), (1, 500), (2, 0)]
    assert all(x0.abs().max() <= 1 for _, _, _, x0, _ in seen)
    torch.testing.assert_close(out, seen[-1][3], rtol=1e-6, atol=0)                # the last estimate is the sample


def test_times_are_float32_of_the_batch():
    def check(x, t):
        assert t.dtype == torch.float32 and t.shape == (3,)
        return x

    generalized_steps(check, SCHEDULE, normal(0, (3, 1, 2, 2)), [5, 9])


@pytest.mark.parametrize(("sampler", "change", "message"), [
    (generalized_steps, {"eta": 1.5}, r"eta 1.5 is not in \[0, 1\]"),
    (generalized_steps, {"eta": 0.5}, "give noise_fn"),
    (ddpm_steps, {}, "give noise_fn"),
    (ddpm_steps, {"var_type": "learned"}, "fixedlarge, fixedsmall"),
    (generalized_steps, {"timesteps": [5, 5]}, "ascending"),
    (generalized_steps, {"timesteps": []}, "non-empty"),
    (generalized_steps, {"timesteps": [1000]}, r"\[0, 1000\)"),
    (generalized_steps, {"eps_scaler": (-0.1, 0.1)}, "above 0"),
])
def test_refusals(sampler, change, message):
    steps = change.pop("timesteps", [0, 500])
    with pytest.raises(ValueError, match=message):
        sampler(gaussian_network(1.0), SCHEDULE, normal(0, (1, 1, 2, 2)), steps, **change)
