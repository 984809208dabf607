"""The variational bound against guided-diffusion's numbers and closed forms, and ADM's chains and losses with it."""

from math import log

import pytest
import torch
from torch.distributions import Normal

from functions.betas import BETAS
from functions.denoiser import Denoiser
from functions.denoising import ddpm_steps, generalized_steps
from functions.losses import sequence_aware_loss
from functions.schedule import DiscreteSchedule
from functions.timesteps import sampling_times
from functions.variational import (
    VARIATIONAL,
    Transitions,
    bound_terms,
    level_log_likelihood,
    normal_kl,
    prior_bits,
    variational_bits,
)
from tests.adm import Playback, cases, denoiser_of, label, network, of_kind, relative_error, schedule_of

COSINE = DiscreteSchedule(BETAS["cosine"](None, None, 1000))


def var_type_of(flags: dict) -> str:
    return "learned" if flags["learn_sigma"] else "fixedsmall" if flags["sigma_small"] else "fixedlarge"


def network_of(case: dict):
    return Playback(case["outputs"], case["told"]) if "outputs" in case else network(case)


# Tables

@pytest.mark.parametrize("case", of_kind("betas"), ids=label)
def test_published_betas(case):
    name = {"linear": "adm_linear", "cosine": "cosine"}[case["noise_schedule"]]
    assert torch.allclose(BETAS[name](None, None, case["diffusion_steps"]), case["betas"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", of_kind("coefficients"), ids=label)
def test_published_coefficients(case):
    schedule = schedule_of(case)
    if case["timestep_respacing"]:
        times = sampling_times(schedule, case["timestep_respacing"], "respace")
        assert times == list(case["timestep_map"])
        shorter, chain = schedule.respaced(times), Transitions(schedule, times)      # a list of steps is that chain
        transitions = Transitions(shorter, range(len(times)))
        k = torch.arange(len(times))
        for var_type in ("fixedsmall", "fixedlarge"):
            assert torch.allclose(chain.log_variance(k, var_type), transitions.log_variance(k, var_type), atol=1e-5)
    else:
        transitions = Transitions(schedule, range(schedule.num_timesteps))
    one, zero, k = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double(), torch.arange(len(case["betas"]))
    assert torch.allclose(transitions.mean(one, zero, k).flatten(), case["posterior_mean_coef1"], rtol=1e-8, atol=1e-13)
    assert torch.allclose(transitions.mean(zero, one, k).flatten(), case["posterior_mean_coef2"], rtol=1e-8, atol=1e-13)
    small, large = (transitions.log_variance(k, "learned", torch.full((len(k), 1, 1, 1), v).double()).flatten()
                    for v in (0.0, 1.0))
    assert torch.allclose(small, case["posterior_log_variance_clipped"], rtol=0, atol=1e-9)
    assert torch.allclose(large, case["betas"].log(), rtol=0, atol=1e-9)
    assert torch.equal(transitions.log_variance(k, "fixedsmall").flatten(), small.float())
    assert torch.equal(transitions.log_variance(k, "fixedlarge").flatten(),
                       torch.cat([small[:1], large[1:]]).float())


# Losses, chains and the bound with ADM's networks

@pytest.mark.parametrize("case", cases("adm_loss"), ids=label)
def test_losses_and_their_gradients(case):
    flags, k, model, schedule = case["diffusion"], case["t"], network(case), schedule_of(case["diffusion"])
    if flags["timestep_respacing"]:
        schedule = schedule.respaced(case["timestep_map"])
    denoiser = denoiser_of(case, model, schedule)
    terms = sequence_aware_loss(denoiser, case["x0"], k, case["noise"][None], lamda=0.0, num_consecutive_steps=0,
                                input_perturbation=flags["input_pertub"], perturbation_noise=case["xi"][None],
                                perturbation_target="unperturbed", reduce="mean")
    total = terms.total
    if flags["learn_sigma"] or "kl" in case["loss_type"]:
        transitions = Transitions(schedule, range(schedule.num_timesteps))
        kind = {"mse": "hybrid", "rescaled_mse": "rescaled_hybrid"}.get(case["loss_type"], case["loss_type"])
        detached, objective = VARIATIONAL[kind]
        estimate = denoiser.prediction.read(schedule, terms.x_t, k, terms.raw)
        log_variance = transitions.log_variance(k, var_type_of(flags), estimate.variance)
        bits = variational_bits(transitions, case["x0"], terms.x_t,
                                estimate.x0.detach() if detached else estimate.x0, log_variance, k)
        total = objective(terms.total, bits, len(transitions))
        if "vb" in case:
            assert torch.allclose(total - terms.total, case["vb"], rtol=1e-4, atol=1e-6)
    total.mean().backward()
    assert torch.allclose(total, case["loss"], rtol=1e-4, atol=0)
    if "mse" in case:
        assert torch.allclose(terms.base, case["mse"], rtol=1e-4, atol=0)
    assert relative_error(model.out[2].bias.grad, case["grad_out_bias"]) < 1e-4
    assert relative_error(model.time_embed[0].bias.grad, case["grad_time_bias"]) < 1e-4
    assert torch.stack([p.grad.norm() for p in model.parameters()]).norm().item() == pytest.approx(
        case["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("case", cases("adm_sampling"), ids=label)
def test_chains(case):
    denoiser = denoiser_of(case, network_of(case), schedule_of(case["diffusion"]))
    shared = {"eps_scaler": case["eps_scaler"], "clip_denoised": case["clip_denoised"],
              "noise_fn": lambda index: case["noise"][index]}
    if case["loop"] == "p_sample":
        out = ddpm_steps(denoiser, case["x"], case["timesteps"], var_type=var_type_of(case["diffusion"]), **shared)
    else:
        out = generalized_steps(denoiser, case["x"], case["timesteps"], eta=case["eta"], **shared)
    assert relative_error(out, case["out"]) < 1e-4


@pytest.mark.parametrize("case", of_kind("bpd"), ids=label)
def test_bits_per_dimension(case):
    x0, schedule = case["x0"], schedule_of(case["diffusion"])
    terms = bound_terms(denoiser_of(case, network_of(case), schedule), x0, case["timesteps"],
                        noise_fn=lambda index: case["noise"][index], var_type=var_type_of(case["diffusion"]),
                        clip_denoised=case["clip_denoised"])
    bits, x0_error, eps_error = (torch.stack(column, dim=1) for column in zip(*terms, strict=True))
    prior = prior_bits(schedule, x0, case["timesteps"][-1])
    for given, key in ((bits, "vb"), (x0_error, "xstart_mse"), (eps_error, "mse")):
        assert relative_error(given, case[key]) < 1e-4
    assert torch.allclose(prior, case["prior_bpd"], rtol=0, atol=1e-6)
    assert torch.allclose(bits.sum(1) + prior, case["total_bpd"], rtol=1e-4, atol=0)


# Closed forms

def test_the_exact_network_gives_the_entropy_of_gaussian_data():
    """x0 ~ N(0, s^2), s of many 8-bit levels; T = 1000, variances learned."""
    s = 0.2
    torch.manual_seed(0)
    levels = (127.5 * s * torch.randn(64, 3, 16, 16) + 127.5).round().clamp(0, 255)
    x0 = levels / 127.5 - 1

    smallest = Transitions(COSINE, range(1000)).log_variance(torch.tensor([0])).exp().item()

    def exact(x, t):
        abar = (COSINE.alpha(t.long()) ** 2).float()
        variance = abar * s**2 + 1 - abar
        below = torch.where(t.view(-1, 1, 1, 1) > 0, (COSINE.alpha((t - 1).clamp(min=0).long()) ** 2).float(), 1.0)
        beta = 1 - abar / below
        # Of q(x_j | x_i) for this data: 1/v = 1/(its own) + (1 - beta)/beta; log v between log small and log large.
        own = below * s**2 + 1 - below
        log_v = -torch.log(1 / own + (1 - beta) / beta)
        small = torch.log((beta * (1 - below) / (1 - abar)).clamp(min=smallest))
        v = (log_v - small) / (beta.log() - small)
        return torch.cat([(1 - abar).sqrt() / variance * x, (2 * v - 1).expand_as(x)], dim=1)

    draws = torch.Generator().manual_seed(1)
    terms = bound_terms(Denoiser(exact, COSINE), x0, range(1000), clip_denoised=False,
                        noise_fn=lambda index: torch.randn(x0.shape, generator=draws))
    bits = sum(term.bits for term in terms) + prior_bits(COSINE, x0, 999)
    nats = -Normal(0, s).log_prob(x0).mean().item() + log(127.5)     # of these very images; 127.5 levels a unit
    assert bits.mean().item() == pytest.approx(nats / log(2), rel=0.01)


def test_likelihoods_of_all_levels_sum_to_one():
    levels = torch.arange(256) / 127.5 - 1
    mass = level_log_likelihood(levels, torch.tensor(0.3), torch.tensor(-4.0)).exp()
    assert mass.sum().item() == pytest.approx(1, abs=1e-5)
    below = Normal(0.3, torch.tensor(-2.0).exp()).cdf((levels[1:] + levels[:-1]) / 2)
    exact = torch.cat([below, torch.ones(1)]) - torch.cat([torch.zeros(1), below])
    assert (mass - exact).abs().max() < 1e-4                                 # the tanh form is an approximation


def test_kl_closed_form():
    kl = normal_kl(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.0), torch.tensor(log(4.0)))
    assert kl.item() == pytest.approx(log(2) + (1 + 1) / 8 - 0.5)
    assert normal_kl(torch.tensor(2.0), torch.tensor(-9.0), torch.tensor(2.0), torch.tensor(-9.0)) == 0


def test_a_chain_of_one_step():
    transitions = Transitions(COSINE, [400])
    k = torch.zeros(1, dtype=torch.long)
    assert transitions.log_variance(k).item() == pytest.approx(2 * log(COSINE.sigma(400)), abs=1e-5)
    x = torch.randn(1, 1, 2, 2)
    assert torch.allclose(transitions.mean(x, 9 * x, k), x)


@pytest.mark.parametrize(("var_type", "message"), [
    ("learned", "var_type 'learned' needs a network with learned variance"),
    ("medium", "var_type 'medium' is unknown; known: fixedlarge, fixedsmall, learned")])
def test_refused_variances(var_type, message):
    with pytest.raises(ValueError, match=message):
        Transitions(COSINE, range(1000)).log_variance(torch.tensor([5]), var_type)
