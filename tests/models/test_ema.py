"""The moving average against its closed form."""

import pytest
import torch
from torch import nn

from models import make_ema


class Scalar(nn.Module):
    """One parameter and one buffer, in float64 so that closed forms hold to rounding."""

    def __init__(self, value: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], dtype=torch.float64))
        self.register_buffer("table", torch.ones(2))


def follow(ema, values):
    for value in values:
        ema.update(Scalar(value))
    return ema.module.weight.item()


def test_starts_as_a_copy_of_its_own():
    model = Scalar(3.0)
    ema = make_ema(model, 0.9)
    assert ema.module.weight.item() == 3.0
    with torch.no_grad():
        model.weight.fill_(5.0)
    assert ema.module.weight.item() == 3.0
    assert not ema.module.weight.requires_grad and not ema.module.training


def test_constant_mu_closed_form():
    """From 0 towards a constant 1: ema_n = 1 - mu^n."""
    assert follow(make_ema(Scalar(0.0), 0.9), [1.0] * 20) == pytest.approx(1 - 0.9**20, rel=1e-12)


def test_first_update_already_averages():
    assert follow(make_ema(Scalar(2.0), 0.75), [6.0]) == pytest.approx(0.75 * 2 + 0.25 * 6, rel=1e-12)


def test_zero_rate_copies():
    assert follow(make_ema(Scalar(0.0), 0.0), [1.0, 7.0]) == 7.0


def test_warmup_closed_form():
    """1 - ema_n is the product of min(mu, (1 + i) / (10 + i)); mu = 0.5 binds from i = 8 on."""
    expected = 1.0
    for i in range(1, 13):
        expected *= min(0.5, (1 + i) / (10 + i))
    assert follow(make_ema(Scalar(0.0), 0.5, warmup=True), [1.0] * 12) == pytest.approx(1 - expected, rel=1e-12)


@pytest.mark.parametrize("warmup", [False, True])
def test_resume_is_exact(warmup):
    values = torch.randn(10, generator=torch.Generator().manual_seed(0)).tolist()
    whole = make_ema(Scalar(0.0), 0.5, warmup)
    follow(whole, values)
    first = make_ema(Scalar(0.0), 0.5, warmup)
    follow(first, values[:6])
    second = make_ema(Scalar(9.0), 0.5, warmup)
    second.load_state_dict(first.state_dict(), first.updates)
    follow(second, values[6:])
    assert torch.equal(second.module.weight, whole.module.weight)
    assert second.updates == whole.updates == 10


def test_buffers_are_not_averaged_and_names_are_bare():
    model = Scalar(1.0)
    ema = make_ema(model, 0.5)
    model.table.zero_()
    ema.update(model)
    assert torch.equal(ema.module.table, torch.ones(2))
    assert list(ema.state_dict()) == list(model.state_dict()) == ["weight", "table"]


def test_wrapped_model_is_followed():
    model = Scalar(0.0)
    ema = make_ema(model, 0.5)
    ema.update(nn.Sequential(Scalar(1.0)))          # the same parameters under other names, as DDP has them
    assert ema.module.weight.item() == 0.5


def test_network_after_updates_equals_network_with_averaged_weights():
    torch.manual_seed(0)
    start, end = nn.Linear(3, 3), nn.Linear(3, 3)
    ema = make_ema(start, 0.9)
    ema.update(end)
    assert torch.allclose(ema.module.weight, 0.9 * start.weight + 0.1 * end.weight, atol=1e-7)
