import pytest
import torch

from functions.losses import sequence_aware_loss
from functions.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))


def draws(K=3, B=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0 = torch.rand(B, 3, 4, 4, generator=g) * 2 - 1
    noise, xi = torch.randn(2, K, B, 3, 4, 4, generator=g)
    return x0, torch.tensor([0, 1, 500, 999])[:B], noise, xi


def model(x, t):
    return 0.3 * x + 0.001 * t.view(-1, 1, 1, 1)


def test_golden(golden, golden_unet):
    for case in golden("sequence_aware_loss"):
        with torch.no_grad():
            terms = sequence_aware_loss(golden_unet, SCHEDULE, case["x0"], case["t"], case["noise"],
                                        lamda=case["lamda"], num_consecutive_steps=case["num_consecutive_steps"])
        assert terms.total.mean().item() == pytest.approx(case["loss"].item(), rel=1e-4)


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("gamma", [0.0, 0.15])
def test_one_call_equals_the_definition_step_by_step(K, gamma):
    x0, t, noise, xi = draws(K)
    terms = sequence_aware_loss(model, SCHEDULE, x0, t, noise, num_consecutive_steps=K, lamda=0.5,
                                input_perturbation=gamma, perturbation_noise=xi)
    for b in range(4):
        total = torch.zeros(3, 4, 4)
        for k in range(min(K, int(t[b]) + 1)):                                     # steps below 0 are left out
            step = t[b:b + 1] - k
            x = SCHEDULE.add_noise(x0[b:b + 1], (noise + gamma * xi)[k, b:b + 1], step)
            error = (noise[k, b:b + 1] - model(x, step))[0]
            total += error
            if k == 0:
                base = error.square().sum()
        assert terms.base[b].item() == pytest.approx(base.item(), rel=1e-5)
        assert terms.sequence[b].item() == pytest.approx(total.square().sum().item() / K**2, rel=1e-5)
    torch.testing.assert_close(terms.total, terms.base + 0.5 * terms.sequence)


def test_the_model_is_called_once_and_only_for_what_is_needed():
    seen = []

    def counting(x, t):
        seen.append(len(x))
        return x

    x0, t, noise, _ = draws(3)
    sequence_aware_loss(counting, SCHEDULE, x0, t, noise, num_consecutive_steps=3, lamda=1.0)
    terms = sequence_aware_loss(counting, SCHEDULE, x0, t, noise, num_consecutive_steps=3, lamda=0.0)
    assert seen == [12, 4]
    assert not terms.sequence.any()


def test_without_sequence_and_perturbation_it_is_the_plain_loss_to_the_bit():
    x0, t, noise, _ = draws(1)
    plain = (noise[0] - model(SCHEDULE.add_noise(x0, noise[0], t), t)).square().flatten(1).sum(1)
    for K in (0, 1, 5):
        terms = sequence_aware_loss(model, SCHEDULE, x0, t, noise, num_consecutive_steps=K, lamda=0.0)
        assert torch.equal(terms.total, plain)


def test_perturbation_leaves_the_target_alone():
    """An oracle that returns the noise hidden in x_t sees n + gamma xi: the loss is ||gamma xi||^2."""
    x0, t, noise, xi = draws(1)
    t = t.clamp(min=100)                                                            # where x_t still holds its noise

    def oracle(x, t):
        abar = SCHEDULE.alpha_bar(t)
        return (x - abar.sqrt() * x0) / (1 - abar).sqrt()

    terms = sequence_aware_loss(oracle, SCHEDULE, x0, t, noise, lamda=0.0, input_perturbation=0.1,
                                perturbation_noise=xi)
    torch.testing.assert_close(terms.base, (0.1 * xi[0]).square().flatten(1).sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("change", "message"), [
    ({"num_consecutive_steps": 0}, "needs at least 1"),
    ({"lamda": -1.0}, "must be >= 0"),
    ({"input_perturbation": 0.1}, "perturbation_noise"),
    ({"num_consecutive_steps": 4}, "noise must be"),
])
def test_refusals(change, message):
    x0, t, noise, _ = draws(3)
    with pytest.raises(ValueError, match=message):
        sequence_aware_loss(model, SCHEDULE, x0, t, noise, **{"num_consecutive_steps": 2, "lamda": 1.0, **change})
