import math

import pytest
import torch

from configs.schema import DiffusionSection
from functions.schedule import SCHEDULES, NoiseSchedule


def make(name, T=1000):
    return NoiseSchedule.from_config(DiffusionSection(beta_schedule=name, num_diffusion_timesteps=T))


@pytest.mark.parametrize(("name", "t", "beta"), [
    ("linear", 0, 1e-4), ("linear", 999, 0.02), ("quad", 0, 1e-4), ("quad", 999, 0.02), ("const", 500, 0.02),
    ("jsd", 0, 1 / 1000), ("jsd", 998, 1 / 2), ("jsd", 999, 0.999),
    ("sigmoid", 0, (0.02 - 1e-4) / (1 + math.exp(6)) + 1e-4),
    ("cosine", 999, 0.999),
    ("cosine", 0, 1 - (math.cos((0.001 + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2),
])
def test_betas(name, t, beta):
    schedule = make(name)
    assert 1 - schedule.exact_alpha_bar(t) / schedule.exact_alpha_bar(t - 1) == pytest.approx(beta, rel=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_alpha_bar_falls_from_one_and_stays_above_zero(name):
    table = make(name).alpha_bar(torch.arange(-1, 1000)).flatten()
    assert table[0] == 1 and table.dtype == torch.float32
    assert (table[1:] < table[:-1]).all() and table[-1] > 0


def test_shapes():
    schedule = make("linear")
    assert schedule.alpha_bar(3).shape == (1, 1, 1, 1)
    assert schedule.alpha_bar(torch.tensor([3, -1])).shape == (2, 1, 1, 1)
    assert schedule.alpha_bar(-1).item() == 1


def test_alpha_bar_is_the_product_in_float64():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    product = math.prod((1 - b) for b in betas.tolist())
    assert NoiseSchedule(betas).exact_alpha_bar(999) == pytest.approx(product, rel=1e-12)


def test_predict_x0_inverts_add_noise():
    schedule, g = make("linear"), torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 3, 5, 7, generator=g)
    t = torch.tensor([-1, 0, 300, 600])
    torch.testing.assert_close(schedule.predict_x0(schedule.add_noise(x0, noise, t), noise, t), x0, rtol=0, atol=1e-4)
    assert torch.equal(schedule.add_noise(x0, noise, t)[0], x0[0])                  # t = -1


@pytest.mark.parametrize("betas", [[], [[0.1]], [0.0, 0.1], [0.1, 1.0, 0.1], [0.1, 1.1], [0.1, float("nan")]])
def test_refusals(betas):
    with pytest.raises(ValueError, match="betas"):
        NoiseSchedule(betas)
    assert NoiseSchedule([0.1, 1.0]).exact_alpha_bar(1) == 0                        # 1 is allowed in last place
