"""EDM's four preconditioners: coefficients, denoisers, losses and gradients of the published code, and identities."""

import pytest
import torch

from functions.denoiser import Denoiser
from functions.levels import lognormal_sigma, ve_training_sigma, vp_time, vp_training_sigma
from functions.losses import sequence_aware_loss
from functions.preconditioning import EDM, IDDPM, PRECONDITIONERS, VE, VP
from functions.schedule import DiscreteSchedule, SigmaSchedule
from tests.edm_cases import build, cases, error, one

OF_CLASS = {"EDMPrecond": EDM, "VPPrecond": VP, "VEPrecond": VE, "iDDPMPrecond": IDDPM}
OF_LOSS = {"EDMLoss": lognormal_sigma, "VPLoss": vp_training_sigma, "VELoss": ve_training_sigma}


LEVELS = SigmaSchedule()
GRID = DiscreteSchedule(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))


def of(case):
    given = case["init_kwargs"]
    return OF_CLASS[case["class_name"]](**{key: given[key] for key in ("sigma_data",) if key in given})


def close(value, expected, tolerance=3e-5):
    return torch.allclose(torch.as_tensor(value, dtype=torch.float64).flatten(), expected.double().flatten(), tolerance,
                          0)


@pytest.mark.parametrize("case", [pytest.param(p.values[0] | {"class_name": p.values[0]["name"]}, id=p.id)
                                  for p in cases("misc", "preconditioning")])
def test_coefficients_and_ranges_are_published(case):
    prediction, sigma = of(case), case["sigma"]
    ones = torch.ones(len(sigma), 1, 1, 1)
    fed, c_noise = prediction.feed(LEVELS, ones, sigma)
    assert close(fed.expand_as(ones), case["c_in"]) and c_noise.shape == sigma.shape
    assert torch.allclose(c_noise, case["c_noise"], 1e-5, 1e-6)
    assert close(prediction.read(LEVELS, ones, sigma, 0 * ones).x0, case["c_skip"])
    assert close(prediction.read(LEVELS, 0 * ones, sigma, ones).x0, case["c_out"])
    assert prediction.sigma_min == pytest.approx(case["sigma_min"], rel=1e-6)
    assert prediction.sigma_max == pytest.approx(case["sigma_max"], rel=1e-6)


@pytest.mark.parametrize("case", cases("networks", "network"))
def test_denoiser_is_published(case):
    prediction, x, sigma = of(case), case["x"], case["sigma"]
    fed, c_noise = prediction.feed(LEVELS, x, sigma)
    assert torch.allclose(c_noise, case["c_noise"], 1e-6)
    x0, eps, variance = prediction.read(LEVELS, x, sigma, case["F_x"])
    assert error(x0, case["D_x"]) < 1e-5 and variance is None
    assert torch.allclose(x0 + sigma.view(-1, 1, 1, 1) * eps, x, 0, 1e-4 * sigma.max().item())
    model = build(case)
    with torch.no_grad():
        for key, labels, augment in (("D_x", case["class_labels"], case["augment_labels"]),
                                     ("D_x_without_labels", None, case["augment_labels"]),
                                     ("D_x_without_augment", case["class_labels"], None)):
            if key in case:
                raw = model(fed, c_noise, labels, augment)
                assert error(prediction.read(LEVELS, x, sigma, raw).x0, case[key]) < 1e-4


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_a_number_and_a_tensor_of_it_give_the_same(name):
    """Step by step the samplers give numbers, in training times are tensors; both on any schedule."""
    prediction, x, raw = PRECONDITIONERS[name](), torch.randn(2, 3, 4, 4), torch.randn(2, 6, 4, 4)
    level = prediction.round(0.7)
    numbers, tensors = ((prediction.feed(LEVELS, x, t), prediction.read(LEVELS, x, t, raw[:, :3]),
                         prediction.target(LEVELS, x, raw[:, 3:], t)) for t in (level, torch.full((2,), level)))
    assert isinstance(numbers[0][1], float) and torch.allclose(torch.tensor(numbers[0][1]), tensors[0][1], 1e-6)
    for one_, other in ((numbers[0][0], tensors[0][0]), *zip(numbers[1][:2], tensors[1][:2], strict=True),
                        (numbers[2], tensors[2])):
        assert torch.allclose(one_, other, 1e-5, 1e-6)
    doubled = prediction.read(LEVELS, x.double(), level, raw.double())
    assert doubled.x0.dtype == torch.float64


@pytest.mark.parametrize("name", PRECONDITIONERS)
@pytest.mark.parametrize("schedule, t", [(LEVELS, torch.tensor([0.01, 0.5, 60.0])),
                                         (GRID, torch.tensor([0, 300, 999]))])
def test_target_is_what_read_takes_apart(name, schedule, t):
    prediction = PRECONDITIONERS[name]()
    x0, n = torch.randn(2, 3, 3, 2, 2, dtype=torch.float64)
    x = schedule.alpha(t, x0.dtype) * x0 + schedule.sigma(t, x0.dtype) * n
    raw = prediction.target(schedule, x0, n, t)
    estimate = prediction.read(schedule, x, t, raw)
    assert torch.allclose(estimate.x0, x0, 1e-9, 1e-9) and torch.allclose(estimate.eps, n, 1e-9, 1e-9)


def test_vp_and_iddpm_see_x_itself_on_a_vp_chain():
    x, t = torch.randn(3, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 300, 999])
    for prediction in (VP(), IDDPM()):
        assert torch.allclose(prediction.feed(GRID, x, t)[0], x, 1e-12)


def test_vp_time_on_the_grid_is_no_offset():
    case = one("misc", "vp_grid")
    grid = torch.zeros(len(case["t"]), 1, 1, 1)
    c_noise = VP().feed(GRID, grid, case["t"])[1]
    assert torch.allclose(c_noise.double(), case["c_noise"], 2e-4)
    assert close((1 / GRID.alpha(case["t"], torch.float64)**2 - 1).sqrt(), case["sigma"], 1e-9)


def test_eps_keeps_its_digits_at_a_low_level():
    """By subtraction, 5e-5 of it are lost in float32 at s = 0.002 (edm.md, section 10)."""
    torch.manual_seed(0)
    prediction, level = EDM(), 0.002
    y, raw = torch.randn(2, 1, 3, 8, 8, dtype=torch.float64)
    exact = prediction.read(LEVELS, y, level, raw).eps
    x0, eps, _ = prediction.read(LEVELS, y.float(), level, raw.float())
    assert error(eps.double(), exact) < 3e-6
    assert error((y.float() - x0).double() / level, exact) > 3e-5
    assert torch.allclose(exact, (y - prediction.read(LEVELS, y, level, raw).x0) / level, 1e-9, 1e-9)


def test_iddpm_rounds_to_the_nearest_level_that_it_knows():
    case, prediction = one("misc", "iddpm"), IDDPM()
    rounded = torch.tensor([prediction.round(float(level)) for level in case["sigma"]])
    assert torch.allclose(rounded, case["rounded"], 1e-6)
    c_noise = prediction.feed(LEVELS, torch.zeros(len(rounded), 1, 1, 1), case["rounded"])[1]
    assert torch.equal(c_noise, 999.0 - case["index"])
    assert EDM().round(0.123) == VP().round(0.123) == VE().round(0.123) == 0.123


def test_pure_noise_is_refused():
    class Pure(SigmaSchedule):
        def alpha(self, t, dtype=torch.float32):
            return 0.0

    with pytest.raises(ValueError, match="pure noise"):
        EDM().read(Pure(), torch.zeros(1, 1, 2, 2), 1.0, torch.zeros(1, 1, 2, 2))


def level_of(case):
    """The levels that follow from the draw of a case."""
    names = {"P_mean": "mean", "P_std": "std"}
    constants = {names[key]: value for key, value in case["loss_kwargs"].items() if key in names}
    return OF_LOSS[case["loss"]](case["rnd"].flatten(), **constants)


@pytest.mark.parametrize("case", cases("loss", "loss"))
def test_loss_in_network_space_is_the_published_one(case):
    """weight (D - y)^2 = (F* - F)^2 for each pixel, whatever the preconditioner."""
    prediction = of(case["net"])
    assert close(level_of(case), case["sigma"], 2e-5)
    y, noise, denoised, sigma = (case[key].double() for key in ("y", "noise", "D_yn", "sigma"))
    t = sigma.flatten()
    raw = prediction.target(LEVELS, denoised, (y + sigma * noise - denoised) / sigma, t)
    assert error((prediction.target(LEVELS, y, noise, t) - raw)**2, case["value"]) < 1e-4


@pytest.mark.parametrize("case", [p for p in cases("loss", "loss") if "grad_norms" in p.values[0]])
def test_gradients_of_our_loss_are_the_published_ones(case):
    model, labels = build(case["net"]), case["labels"]
    condition = {"labels": labels} if labels.shape[1] else {}
    if case["augment_labels"] is not None:
        condition["augment"] = case["augment_labels"]
    denoiser = Denoiser(model, LEVELS, of(case["net"]), condition)
    terms = sequence_aware_loss(denoiser, case["y"], case["sigma"].flatten(), case["noise"][None], lamda=0.0)
    assert error(terms.total.detach(), case["value"].flatten(1).sum(1)) < 1e-4
    objective = terms.total.mean()
    assert objective.item() == pytest.approx(case["objective"], rel=1e-4)
    objective.backward()
    largest = max(case["grad_norms"].values())
    for name, norm in case["grad_norms"].items():
        grad = model.get_parameter(name.removeprefix("model.")).grad
        assert grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6 * largest), name


def network_of(weights):
    """Some smooth function of the image and the number that stands for its noise level."""
    def network(x, t):
        wave = (t.double() / 50).sin().view(-1, 1, 1, 1)
        return torch.tanh(torch.einsum("ij,bjhw->bihw", weights, x.double()) + wave).to(x.dtype)
    return network


def test_on_ddpms_steps_a_vp_network_has_sa_dpms_loss():
    """edm.md, section 10: in units of F nothing is left to weigh. A network that is told the level instead of t."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(6, 3, 4, 4, generator=generator), torch.randn(3, 6, 3, 4, 4, generator=generator)
    network, t = network_of(torch.randn(3, 3, generator=generator).double()), torch.tensor([0, 1, 2, 200, 600, 999])
    preconditioned = Denoiser(network, GRID, "vp")
    plain = Denoiser(lambda x, t: network(x, 999 * vp_time(GRID.level(t).flatten())), GRID)
    ours, sa_dpm = (sequence_aware_loss(denoiser, x0, t, noise, num_consecutive_steps=3, lamda=0.7)
                    for denoiser in (preconditioned, plain))
    torch.testing.assert_close(ours.total, sa_dpm.total, rtol=2e-5, atol=0)
    assert (ours.sequence > 0).all()


def test_sequence_terms_of_edm_are_signed_sums_of_noise_errors():
    """r_k = sqrt(1 + s_k^2/sigma_data^2) (n_k - e_k) up to one sign, at levels that are neighbours in s^(1/7)."""
    generator = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(*shape, 2, 3, 4, 4, generator=generator, dtype=torch.float64) for shape in ((), (2,)))
    t = torch.tensor([1.0, 0.002], dtype=torch.float64)
    denoiser = Denoiser(network_of(torch.randn(3, 3, generator=generator).double()), LEVELS, "edm")
    terms = sequence_aware_loss(denoiser, x0, t, noise, num_consecutive_steps=2, lamda=1.0)
    lower, exists = LEVELS.below(t, 1)
    assert exists.tolist() == [True, False] and (t / lower)[0].item() == pytest.approx(1.0103, abs=2e-4)
    summed = 0
    for level, n, there in ((t, noise[0], torch.ones(2)), (lower, noise[1], exists)):
        s = level.view(-1, 1, 1, 1)
        e = denoiser(x0 + s * n, level).eps
        summed = summed + there.view(-1, 1, 1, 1) * (1 + s**2 / 0.25).sqrt() * (n - e)
    torch.testing.assert_close(terms.sequence, summed.square().flatten(1).sum(1) / 4, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_input_perturbation_keeps_the_noise_as_target(name):
    """edm.md, section 10: the loss is that of n - e' with e' = (y' - D)/s, weighted as without perturbation."""
    generator = torch.Generator().manual_seed(2)
    x0, n, xi = (torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    prediction = PRECONDITIONERS[name]()
    t = torch.tensor([prediction.round(level) for level in (0.05, 0.5, 3.0, 40.0)], dtype=torch.float64)
    denoiser = Denoiser(network_of(torch.randn(3, 3, generator=generator).double()), LEVELS, prediction)
    terms = sequence_aware_loss(denoiser, x0, t, n[None], lamda=0.0, input_perturbation=0.15,
                                perturbation_noise=xi[None])
    s = t.view(-1, 1, 1, 1)
    e = denoiser(x0 + s * (n + 0.15 * xi), t).eps
    weight = 1 + s**2 / 0.25 if name == "edm" else 1.0
    torch.testing.assert_close(terms.total, (weight * (n - e)**2).flatten(1).sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sigma, weight", [(0.02, 1.0016), (0.5, 2.0), (1.0, 5.0), (10.0, 401.0), (80.0, 25601.0)])
def test_edm_weights_the_noise_error_by_1_plus_4_sigma_squared(sigma, weight):
    x0, n, e = torch.randn(3, 1, 3, 4, 4, dtype=torch.float64)
    prediction = EDM()
    loss = (prediction.target(LEVELS, x0, n, sigma)
            - prediction.target(LEVELS, x0 + sigma * (n - e), e, sigma)).square().sum()
    assert loss.item() == pytest.approx(weight * (n - e).square().sum().item(), rel=1e-3 if sigma == 0.02 else 1e-9)


@pytest.mark.parametrize("sigma, plain, perturbed, other", [(1.0, 0.2000, 0.2141, 0.1965),
                                                            (10.0, 0.00249, 0.02439, 0.00244)])
def test_input_perturbation_aims_at_the_perturbed_image(sigma, plain, perturbed, other):
    """Gaussian data of variance 0.25: the best D/y, by regression of each target on y (edm.md, section 10)."""
    gamma, variance = 0.15, 0.25
    total = variance + sigma**2 * (1 + gamma**2)
    assert variance / (variance + sigma**2) == pytest.approx(plain, abs=1e-4)
    assert (variance + sigma**2 * gamma**2) / total == pytest.approx(perturbed, abs=1e-4)
    assert variance / total == pytest.approx(other, abs=1e-4)
    x0, n, xi = torch.randn(3, 1, 1, 4, 4, dtype=torch.float64)
    y = x0 + sigma * (n + gamma * xi)
    raw = EDM().target(LEVELS, x0 + sigma * gamma * xi, n, sigma)
    assert torch.allclose(EDM().read(LEVELS, y, sigma, raw).x0, x0 + sigma * gamma * xi)
