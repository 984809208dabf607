"""The plain readings of ADM's and EDM's procedures compute what this project computes."""

import itertools

import pytest
import torch

from benchmarks import reference, reference_adm, reference_edm
from benchmarks.families import FAMILIES, family_config
from benchmarks.workload import Training, write_pictures
from functions.denoiser import Denoiser
from functions.denoising import generalized_steps
from functions.loss_history import LossSecondMoment
from functions.losses import sequence_aware_loss
from functions.ode import heun_steps
from functions.schedule import make_schedule
from functions.timesteps import sampling_times
from functions.variational import Transitions, with_bound
from models import build_model


@pytest.fixture(params=list(FAMILIES))
def family(request):
    """(name, configuration, ours, theirs): two networks of the same weights, none of which is 0."""
    config = family_config(FAMILIES[request.param], "nowhere", 2, small=True)
    config = config.replace("model.dropout", 0.0)
    ours, theirs = build_model(config), reference.build_reference(config, "cpu")
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    theirs.load_state_dict(ours.state_dict())
    return request.param, config, ours, theirs


def draws(count: int):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 16, 16, generator=generator) for _ in range(count)]


def losses(name, config, ours, theirs):
    x0, noise, extra = draws(3)
    x0 = (x0.clamp(-1, 1) * 127.5).round() / 127.5
    if name == "adm":
        k = torch.tensor([0, 700])
        denoiser = Denoiser.of(config, ours)
        terms = sequence_aware_loss(denoiser, x0, k, noise[None], num_consecutive_steps=1, lamda=0, reduce="mean",
                                    input_perturbation=0.15, perturbation_noise=extra[None])
        total = with_bound(terms, config.loss.variational, denoiser, Transitions(denoiser.schedule, range(1000)), x0,
                           k).total
        return total, reference_adm.hybrid_loss(theirs, reference_adm.Process(1000), x0, k, noise, extra, 0.15)
    sigma, told = torch.tensor([0.3, 9.0]), extra[:, 0, 0, :9]
    terms = sequence_aware_loss(Denoiser.of(config, ours).given({"augment": told}), x0, sigma, noise[None],
                                num_consecutive_steps=1, lamda=0, reduce="sum")
    return terms.total, reference_edm.pixel_losses(theirs, x0, sigma.view(-1, 1, 1, 1), noise, told).sum((1, 2, 3))


def test_same_loss_and_gradient_from_the_same_noise(family):
    found = losses(*family)
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)
    gradients = []
    for total, network in zip(found, family[2:], strict=True):
        total.mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[0].abs().max()))


def test_same_picture_from_the_same_noise(family):
    name, config, ours, theirs = family
    (x,), denoiser = draws(1), Denoiser.of(config, ours.eval())
    if name == "adm":
        steps = sampling_times(make_schedule(config.diffusion), "ddim5")
        mine = generalized_steps(denoiser, x, steps, clip_denoised=True)
        other = reference_adm.sample_ddim(theirs.eval(), reference_adm.Process(1000), x, steps)
    else:
        mine = heun_steps(denoiser, 80 * x.double(), sampling_times(make_schedule(config.diffusion), 5))
        other = reference_edm.sample_heun(theirs.eval(), x, 5)
    torch.testing.assert_close(mine.float(), other.float(), rtol=1e-3, atol=1e-3 * float(mine.abs().max()))


@pytest.mark.parametrize("draws_of_each", [3, 12])
def test_the_same_losses_give_the_same_draws(draws_of_each):
    ours, theirs = LossSecondMoment(5), reference_adm.SecondMoments(5)
    k = torch.arange(5).repeat(draws_of_each)
    values = torch.rand(len(k), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours.update(k, values)
    theirs.update(k, values)
    torch.testing.assert_close(ours.probabilities(), torch.from_numpy(theirs.probabilities()))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_both_take_steps_and_make_files(name, tmp_path):
    family, pictures = FAMILIES[name], write_pictures(tmp_path / "pictures", 4, 16)
    config = family_config(family, pictures, 2, small=True)
    for step in (Training(config, tmp_path, "cpu"), family.training(config, pictures, "cpu", workers=0)):
        network = step.diffusion.model if isinstance(step, Training) else step.network
        before = [p.detach().clone() for p in network.parameters()]
        assert step() == 2 and step() == 2                   # EDM's first step has a rate of 0
        assert not all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    sample = family.sampling(config, "cpu", family.settings(2), 2, tmp_path)
    assert sample() == 2 and list(itertools.chain(tmp_path.glob("reference*")))
