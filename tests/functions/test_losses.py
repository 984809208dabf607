import pytest
import torch

from functions.denoiser import Denoiser
from functions.losses import min_snr, sequence_aware_loss
from functions.prediction import PREDICTIONS
from functions.schedule import FlowSchedule, SigmaSchedule
from tests.functions.gaussian import SCHEDULE, exact


def draws(K=3, B=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0 = torch.rand(B, 3, 4, 4, generator=g) * 2 - 1
    noise, xi = torch.randn(2, K, B, 3, 4, 4, generator=g)
    return x0, torch.tensor([0, 1, 500, 999])[:B], noise, xi


def model(x, t):
    return 0.3 * x + 0.001 * t.view(-1, 1, 1, 1)


MODEL = Denoiser(model, SCHEDULE)


def test_golden(golden, golden_unet):
    for case in golden("sequence_aware_loss"):
        with torch.no_grad():
            terms = sequence_aware_loss(Denoiser(golden_unet, SCHEDULE), case["x0"], case["t"], case["noise"],
                                        lamda=case["lamda"], num_consecutive_steps=case["num_consecutive_steps"])
        assert terms.total.mean().item() == pytest.approx(case["loss"].item(), rel=1e-4)


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("gamma", [0.0, 0.15])
def test_one_call_equals_the_definition_step_by_step(K, gamma):
    x0, t, noise, xi = draws(K)
    terms = sequence_aware_loss(MODEL, x0, t, noise, num_consecutive_steps=K, lamda=0.5,
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
    sequence_aware_loss(Denoiser(counting, SCHEDULE), x0, t, noise, num_consecutive_steps=3, lamda=1.0)
    terms = sequence_aware_loss(Denoiser(counting, SCHEDULE), x0, t, noise, num_consecutive_steps=3, lamda=0.0)
    assert seen == [12, 4]
    assert not terms.sequence.any()


def test_without_sequence_and_perturbation_it_is_the_plain_loss_to_the_bit():
    x0, t, noise, _ = draws(1)
    plain = (noise[0] - model(SCHEDULE.add_noise(x0, noise[0], t), t)).square().flatten(1).sum(1)
    for K in (0, 1, 5):
        terms = sequence_aware_loss(MODEL, x0, t, noise, num_consecutive_steps=K, lamda=0.0)
        assert torch.equal(terms.total, plain)


def test_perturbation_leaves_the_target_alone():
    """An oracle that returns the noise hidden in x_t sees n + gamma xi: the loss is ||gamma xi||^2."""
    x0, t, noise, xi = draws(1)
    t = t.clamp(min=100)                                                            # where x_t still holds its noise

    def oracle(x, t):
        return (x - SCHEDULE.alpha(t) * x0) / SCHEDULE.sigma(t)

    terms = sequence_aware_loss(Denoiser(oracle, SCHEDULE), x0, t, noise, lamda=0.0, input_perturbation=0.1,
                                perturbation_noise=xi)
    torch.testing.assert_close(terms.base, (0.1 * xi[0]).square().flatten(1).sum(1), rtol=1e-4, atol=1e-5)


def test_the_mean_over_pixels_is_the_sum_divided():
    x0, t, noise, _ = draws(2)
    a, b = (sequence_aware_loss(MODEL, x0, t, noise, reduce=how) for how in ("sum", "mean"))
    torch.testing.assert_close(a.total / 48, b.total)
    torch.testing.assert_close(a.sequence / 48, b.sequence)


def test_the_terms_carry_the_base_steps_input_and_output():
    x0, t, noise, _ = draws(3)
    terms = sequence_aware_loss(MODEL, x0, t, noise, num_consecutive_steps=3)
    assert torch.equal(terms.x_t, SCHEDULE.add_noise(x0, noise[0], t))
    assert torch.equal(terms.raw, model(terms.x_t, t))


def test_a_learned_variance_has_no_part_in_it():
    x0, t, noise, _ = draws(2)
    both = Denoiser(lambda x, t: torch.cat([model(x, t), 7 * x], 1), SCHEDULE)
    assert torch.equal(sequence_aware_loss(both, x0, t, noise).total, sequence_aware_loss(MODEL, x0, t, noise).total)


@pytest.mark.parametrize(("name", "expected"), [
    ("epsilon", lambda snr: min(snr, 5) / snr), ("v_prediction", lambda snr: min(snr, 5) / (snr + 1)),
    ("sample", lambda snr: min(snr, 5))])
def test_min_snr_in_the_space_of_each_output(name, expected):
    """2303.09556, section 3.4."""
    t = torch.tensor([20, 300, 900])
    found = min_snr(Denoiser(model, SCHEDULE, name), t)
    assert found.tolist() == pytest.approx([expected(SCHEDULE.level(s) ** -2) for s in t.tolist()], rel=1e-4)


@pytest.mark.parametrize("schedule", [SCHEDULE, SigmaSchedule(), FlowSchedule()])
@pytest.mark.parametrize("name", PREDICTIONS)
def test_every_output_and_schedule_has_loss_zero_for_an_oracle(schedule, name):
    """A network that knows x_0 and n errs nowhere, on no consecutive step; with perturbation it still means n."""
    g = torch.Generator().manual_seed(0)
    x0, kind = torch.rand(2, 3, 4, 4, generator=g) * 2 - 1, PREDICTIONS[name]
    noise, xi = torch.randn(2, 3, 2, 3, 4, 4, generator=g)
    t = schedule.at(torch.tensor([0.4, 0.8], dtype=torch.float64))

    class Oracle(Denoiser):
        def raw(self, x, steps):
            return kind.target(schedule, self.image(steps), noise.flatten(0, 1), steps)

    plain, perturbed = Oracle(None, schedule, name), Oracle(None, schedule, name)
    plain.image = lambda steps: x0.repeat(3, 1, 1, 1)
    perturbed.image = lambda steps: x0.repeat(3, 1, 1, 1) + schedule.level(steps) * (0.1 * xi.flatten(0, 1))
    common = {"num_consecutive_steps": 3, "input_perturbation": 0.1, "perturbation_noise": xi}
    assert not sequence_aware_loss(plain, x0, t, noise, num_consecutive_steps=3).total.any()
    assert not sequence_aware_loss(plain, x0, t, noise, perturbation_target="unperturbed", **common).total.any()
    assert not sequence_aware_loss(perturbed, x0, t, noise, perturbation_target="noise", **common).total.any()
    default = sequence_aware_loss(perturbed if kind.perturbation_target == "noise" else plain, x0, t, noise, **common)
    assert not default.total.any()


def test_exact_networks_of_all_outputs_share_the_loss_in_x0_under_min_snr():
    """The weight turns the error of F into that of x_0: one number, whatever the network's output."""
    g = torch.Generator().manual_seed(1)
    x0, noise = torch.rand(4, 3, 4, 4, generator=g), torch.randn(1, 4, 3, 4, 4, generator=g)
    t = torch.tensor([100, 300, 500, 900])
    losses = [sequence_aware_loss(exact(0.25, prediction=name), x0, t, noise, lamda=0.0, weight="min_snr").total
              for name in PREDICTIONS]
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("change", "message"), [
    ({"num_consecutive_steps": 0}, "needs at least 1"),
    ({"lamda": -1.0}, "must be >= 0"),
    ({"input_perturbation": 0.1}, "perturbation_noise"),
    ({"num_consecutive_steps": 4}, "noise must be"),
    ({"reduce": "max"}, "known: mean, sum"),
    ({"weight": "snr"}, "known: min_snr, none"),
    ({"input_perturbation": 0.1, "perturbation_noise": torch.zeros(3, 4, 3, 4, 4), "perturbation_target": "x"},
     "known: noise, unperturbed"),
])
def test_refusals(change, message):
    x0, t, noise, _ = draws(3)
    with pytest.raises(ValueError, match=message):
        sequence_aware_loss(MODEL, x0, t, noise, **{"num_consecutive_steps": 2, "lamda": 1.0, **change})
