"""EDM's and EDM-ES's samplers on their networks, with our samplers: every published chain, and what they do better."""

from math import inf

import pytest
import torch

from functions.denoiser import Denoiser
from functions.denoising import SAMPLERS
from functions.flow_forms import TIMES, FlowForm, VPTime
from functions.levels import RANGES
from functions.ode import euler_steps, heun_steps
from functions.prediction import PREDICTIONS
from functions.schedule import DiscreteSchedule, SigmaSchedule
from functions.timesteps import sampling_times
from tests.edm_cases import build, cases, error
from tests.functions.gaussian import exact

NAMES = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}


def chain_of(case, quirk=False):
    """What the arguments of upstream's two samplers mean here: denoiser, sampler, levels, keywords."""
    given, ablation = case["kwargs"], case["sampler"] == "ablation_sampler"
    prediction = PREDICTIONS[NAMES[case["net"]["class_name"]]]
    spacing = given.get("discretization", "edm") if ablation else "edm"
    default = RANGES[spacing]
    low, high = given.get("sigma_min", default[0]), given.get("sigma_max", default[1])
    times = sampling_times(SigmaSchedule(), given.get("num_steps", 18), spacing, prediction=prediction,
                           sigma_min=low, sigma_max=high, rho=given.get("rho", 7.0) if spacing == "edm" else None)
    low, high = max(low, prediction.sigma_min), min(high, prediction.sigma_max)
    form = FlowForm.of(given.get("schedule", "linear"), given.get("scaling", "none"), given.get("alpha", 1.0),
                       (low, high))
    churn = [given.get(key, usual)
             for key, usual in (("S_churn", 0.0), ("S_min", 0.0), ("S_max", inf), ("S_noise", 1.0))]
    network, calls = build(case["net"]), []

    def counted(x, t, **condition):
        calls.append(t[0].item())
        return network(x.float(), t.float(), **condition)

    labels = {} if case["class_labels"] is None else {"labels": case["class_labels"]}
    denoiser = Denoiser(counted, SigmaSchedule(), prediction, labels)
    sampler = euler_steps if given.get("solver") == "euler" else heun_steps
    options = {"churn": churn, "form": form, "eps_scaler": given.get("eps_scaler"),
               "noise_fn": None if case["noise"] is None else case["noise"].__getitem__}
    return denoiser, sampler, times, options, calls


def run(case):
    denoiser, sampler, times, options, calls = chain_of(case)
    x = case["latents"].double() * times[-1]
    return sampler(denoiser, x, times, **options), times, calls


@pytest.mark.parametrize("case", [p for p in cases("sampling", "sampling") if p.values[0]["note"] != "quirk"])
def test_every_published_chain(case):
    out, times, calls = run(case)
    assert times[::-1] == pytest.approx(case["sigma_steps"][:-1].tolist(), rel=1e-6)
    assert len(calls) == len(case["call_sigmas"]) and out.dtype == torch.float64
    assert error(out, case["out"].double()) < 1e-4


@pytest.mark.parametrize("case", [p for p in cases("sampling", "sampling") if p.values[0]["note"] == "quirk"])
def test_where_edm_es_scales_inconsistently_we_do_not(case):
    """Upstream leaves the ablation's corrector unscaled, and with scaling vp forms e from the wrong x."""
    out, _, calls = run(case)
    denoiser, sampler, times, options, _ = chain_of(case)
    assert len(calls) == len(case["call_sigmas"]) and error(out, case["out"].double()) > 1e-3
    scaled = Denoiser(lambda x, t: None, SigmaSchedule(), denoiser.prediction)
    lambda_ = options.pop("eps_scaler")

    class Everywhere(Denoiser):
        def __call__(self, x, t):
            found = denoiser(x, t)
            eps = found.eps / lambda_
            return found._replace(eps=eps, x0=x - t * eps)

    everywhere = Everywhere(scaled.network, SigmaSchedule(), denoiser.prediction)
    expected = sampler(everywhere, case["latents"].double() * times[-1], times, **options)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


GRID = DiscreteSchedule(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))


@pytest.mark.parametrize("sampler, other", [("euler", "generalized"), ("heun", "heun"), ("dpmpp_2m", "dpmpp_2m")])
@pytest.mark.parametrize("name", ["edm", "vp", "ve"])
def test_a_network_gives_one_chain_on_levels_and_on_ddpms_steps(name, sampler, other):
    """edm.md, section 10: EDM's Euler on sigma_t is DDIM on t, up to the start's scale."""
    torch.manual_seed(0)
    mixing = torch.randn(3, 3, dtype=torch.float64) / 3

    def network(x, t, **_):
        return torch.tanh(torch.einsum("ij,bjhw->bihw", mixing, x) + t.double().sin().view(-1, 1, 1, 1))

    steps = sampling_times(GRID, 50)
    levels, z = [GRID.level(t) for t in steps], torch.randn(2, 3, 4, 4, dtype=torch.float64)

    class Exact(type(PREDICTIONS[name])):                      # c_noise as a number would be rounded to float32
        def feed(self, schedule, x, t):
            fed, c_noise = super().feed(schedule, x, t)
            return fed, torch.full((len(x),), float(c_noise), dtype=torch.float64)

    on_levels = SAMPLERS[sampler](Denoiser(network, SigmaSchedule(), Exact()), z * levels[-1], levels)
    on_steps = SAMPLERS[other](Denoiser(network, GRID, Exact()), z * GRID.sigma(steps[-1]), steps)
    assert error(on_steps, on_levels) < (1e-10 if name != "vp" else 1e-6)           # vp's time is float32 by definition


# ------------------------------------------------------------------------------------------------- forms of the flow


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("scale", ["none", "vp"])
def test_slopes_are_derivatives(time, scale):
    """dX/dtau along the exact flow of data that are a point at 0: y = s n, e = n."""
    form = FlowForm.of(time, scale, 0.5, (0.01, 80.0))
    for level in (0.02, 0.7, 30.0):
        tau, h = form.time.time(level), 1e-6 * form.time.time(level)

        def x_at(tau, form=form):
            return form.scale(form.time.level(tau)) * form.time.level(tau)

        assert form.time.level(tau) == pytest.approx(level, rel=1e-9)
        assert form.slope(tau, level, 1.0) == pytest.approx((x_at(tau + h) - x_at(tau - h)) / (2 * h), rel=1e-6)


@pytest.mark.parametrize("time, scale, alpha", [("linear", "none", 0.5), ("linear", "vp", 1.0), ("ve", "none", 1.0),
                                                ("vp", "vp", 1.0), ("vp", "none", 0.7), ("ve", "vp", 0.5)])
def test_every_form_is_of_second_order(time, scale, alpha):
    v, errors = 0.25, []
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for count in (40, 80, 160):
        times, seen = sampling_times(SigmaSchedule(0.05, 20.0), count), []
        heun_steps(exact(v, SigmaSchedule(), "edm"), x * times[-1], times,
                   form=FlowForm.of(time, scale, alpha, (0.05, 20.0)), callback=lambda i, t, x, *_, s=seen: s.append(x))
        flow = times[-1] * ((v + times[0]**2) / (v + times[-1]**2)) ** 0.5
        errors.append(abs(seen[-1].item() - flow))
    ratio = 8 if (time, alpha) == ("linear", 0.5) else 4       # the midpoint's leading error cancels on this flow
    assert errors[1] / errors[2] == pytest.approx(ratio, rel=0.05)


def test_edms_own_form_is_none_and_agrees_with_the_general_step():
    assert FlowForm.of() is None
    x, times = torch.randn(2, 1, 3, 3, dtype=torch.float64), sampling_times(SigmaSchedule(), 12)
    for steps in (heun_steps, euler_steps):
        plain, general = (steps(exact(0.25, SigmaSchedule(), "edm"), 80 * x, times, form=form, eps_scaler=(0.01, 1.0))
                          for form in (None, FlowForm()))
        torch.testing.assert_close(general, plain, rtol=1e-10, atol=1e-12)


def test_a_form_works_on_steps_of_ddpm_too():
    times, x = sampling_times(GRID, 20), torch.randn(2, 1, 3, 3, dtype=torch.float64)
    plain, midpoint = (heun_steps(exact(0.25), x, times, form=form) for form in (None, FlowForm.of("linear", "vp")))
    assert 0 < error(midpoint, plain) < 0.05


@pytest.mark.parametrize("options, message", [
    ({"time": "cosine"}, "ode_time 'cosine' is unknown; known: linear, ve, vp"),
    ({"scale": "ve"}, "ode_scale 've' is unknown; known: none, vp"),
    ({"alpha": 0.0}, r"alpha 0 is not in \(0, 1\]"),
    ({"time": "vp", "levels": (0.5, 80.0)}, "sigma_min 0.5 is too high"),
])
def test_impossible_forms_are_lines(options, message):
    with pytest.raises(ValueError, match=message):
        FlowForm.of(**options)


def test_vp_time_has_the_constants_of_its_range():
    assert TIMES["vp"](*RANGES["vp"]) == VPTime(pytest.approx(19.9, rel=1e-6), pytest.approx(0.1, rel=1e-5))


def test_one_step_is_eulers_from_the_highest_level():
    """Upstream's list of one level is not a number."""
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    denoiser = exact(0.25, SigmaSchedule(), "edm")
    out = heun_steps(denoiser, 80 * x, sampling_times(SigmaSchedule(), 1))
    torch.testing.assert_close(out, denoiser(80 * x, 80.0).x0)


def test_churn_keeps_the_variance_of_gaussian_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 1, 16, 16, generator=generator, dtype=torch.float64)
    times = sampling_times(SigmaSchedule(), 100)
    out = heun_steps(exact(0.25, SigmaSchedule(), "edm"), 80 * x, times, churn=(20.0, 0.01, 50.0, 1.0),
                     noise_fn=lambda _: torch.randn(x.shape, generator=generator, dtype=torch.float64))
    assert out.var().item() == pytest.approx(0.25, rel=0.02)
