"""loss-second-moment against guided-diffusion's numbers and by hand."""

import pytest
import torch

from functions.loss_history import LossSecondMoment
from tests.adm import label, of_kind


def filled(S=4, history=2) -> LossSecondMoment:
    sampler = LossSecondMoment(S, history)
    for scale in (1.0, 2.0):
        sampler.update(torch.arange(S), scale * torch.arange(1, S + 1))
    return sampler


@pytest.mark.parametrize("case", of_kind("loss_second_moment"), ids=label)
def test_reproduces_the_published_implementation(case):
    S = case["num_timesteps"]
    sampler = LossSecondMoment(S, case["history_per_term"], case["uniform_prob"])
    for update in case["updates"]:
        sampler.update(torch.tensor(update["t"]), torch.tensor(update["losses"], dtype=torch.float64))
        p = sampler.probabilities()
        assert sampler.counts.tolist() == list(update["counts"])
        assert bool((sampler.counts == case["history_per_term"]).all()) == update["warmed_up"]
        assert torch.allclose(p, update["p"], rtol=1e-12, atol=0)
        assert torch.allclose(1 / (S * p), update["importance"], rtol=1e-12, atol=0)
    assert torch.equal(sampler.losses, case["history"])


def test_one_update_equals_several():
    """Also where more losses of one time come than are kept."""
    torch.manual_seed(0)
    times, losses = torch.randint(3, (60,)), torch.rand(60)
    together, apart = LossSecondMoment(3), LossSecondMoment(3)
    together.update(times, losses)
    for i in range(0, 60, 7):
        apart.update(times[i:i + 7], losses[i:i + 7])
    assert torch.equal(together.losses, apart.losses) and torch.equal(together.counts, apart.counts)


def test_draws_follow_the_probabilities_and_weights_keep_the_mean():
    sampler, n = filled(), 100_000
    t, weight = sampler.draw(n, torch.Generator().manual_seed(0))
    p = sampler.probabilities()
    share = torch.bincount(t, minlength=4).double() / n
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all() and p[3] > 3 * p[0]
    assert torch.allclose(weight.double(), 1 / (4 * p[t])) and weight.dtype == torch.float32
    value = torch.tensor([5.0, 1.0, 7.0, 2.0])
    assert abs((weight * value[t]).mean() - value.mean()) < 5 * (weight * value[t]).std() / n**0.5


def test_one_image_has_the_first_of_two_draws():
    """A single draw is made by another kernel, for which the host waits."""
    one, two = ([filled().draw(count, torch.Generator().manual_seed(seed))[0] for seed in range(30)]
                for count in (1, 2))
    assert all(len(draw) == 1 for draw in one) and torch.cat(one).tolist() == [int(draw[0]) for draw in two]


def test_until_every_time_has_its_losses_draws_are_uniform():
    sampler = LossSecondMoment(3, history=2)
    sampler.update(torch.tensor([0, 0, 0, 1, 1, 2]), torch.rand(6))
    t, weight = sampler.draw(10)
    assert torch.equal(weight, torch.ones(10)) and t.dtype == torch.long


def test_losses_that_are_not_finite_are_left_out():
    sampler = filled()
    before = sampler.losses.clone()
    nan, inf = float("nan"), float("inf")
    sampler.update(torch.tensor([1, 2, 1, 1]), torch.tensor([nan, inf, 9.0, nan]))
    before[1] = torch.tensor([before[1, 1], 9.0])
    assert torch.equal(sampler.losses, before)


def test_losses_of_zero_leave_uniform_draws():
    sampler = LossSecondMoment(2, history=1)
    sampler.update(torch.tensor([0, 1]), torch.zeros(2))
    assert torch.equal(sampler.probabilities(), torch.full((2,), 0.5, dtype=torch.float64))


def test_state_goes_round():
    sampler, other = filled(), LossSecondMoment(4, 2)
    other.load_state_dict(sampler.state_dict())
    sampler.update(torch.tensor([0]), torch.tensor([100.0]))              # what was handed out stays as it was
    assert torch.equal(other.probabilities(), filled().probabilities())
    with pytest.raises(ValueError, match=r"loss history of \(4, 2\) \(times, losses\), needed \(5, 2\)"):
        LossSecondMoment(5, 2).load_state_dict(other.state_dict())
