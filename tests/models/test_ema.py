"""The moving average against its closed form."""

import pytest
import torch
from torch import nn

from configs.training import Average
from models import load_profile
from models.ema import EMA, combination, combine, decay_of, profile_exponent
from utils.errors import DataError


class Scalar(nn.Module):
    """One parameter and one buffer, in float64 so that closed forms hold to rounding."""

    def __init__(self, value: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], dtype=torch.float64))
        self.register_buffer("table", torch.ones(2))


def make_ema(model, rate, warmup=False):
    return EMA(model, decay_of(Average(rate=rate, warmup=warmup), 1))


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


def test_half_life_in_images_with_ramp_up():
    """EDM's rule: h = min(half-life, 5% of the images seen before), beta = 0.5^(batch / h); the first step copies."""
    decay = decay_of(Average(half_life=1000.0), batch=10)
    assert decay(1) == 0
    assert decay(101) == pytest.approx(0.5 ** (10 / 50))
    assert decay(10_000) == pytest.approx(0.5 ** (10 / 1000))
    assert decay_of(Average(half_life=1000.0, ramp_up=0.0), 10)(1) == pytest.approx(0.5 ** 0.01)


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_power_profile_is_its_closed_form(length, gamma):
    """EDM2: the weights of steps i follow i^gamma; their relative spread is ``length``."""
    assert profile_exponent(length) == pytest.approx(gamma, abs=0.005)
    decay, n = decay_of(Average(length=length), 64), 2000
    weights = torch.tensor([1 - decay(i) for i in range(1, n + 1)], dtype=torch.float64)
    kept = torch.tensor([decay(i) for i in range(2, n + 1)] + [1.0], dtype=torch.float64).flip(0).cumprod(0).flip(0)
    kept = torch.cat([kept[:-1], torch.ones(1)])
    profile = weights * kept
    times = torch.arange(1, n + 1, dtype=torch.float64) / n
    mean = (profile * times).sum()
    assert profile.sum().item() == pytest.approx(1)
    assert ((profile * (times - mean) ** 2).sum().sqrt() / times[-1]).item() == pytest.approx(length, rel=0.01)


def test_an_average_of_any_length_is_made_up_afterwards():
    """Two profiles kept at eight times give a third one, which followed the same weights, to a percent."""
    generator, kept = torch.Generator().manual_seed(0), []
    walk = torch.randn(1600, generator=generator).cumsum(0).tolist()
    averages = {length: EMA(Scalar(0.0), decay_of(Average(length=length), 1)) for length in (0.05, 0.10, 0.07)}
    for n, value in enumerate(walk, 1):
        for average in averages.values():
            average.update(Scalar(value))
        if n % 200 == 0:
            kept += [((n, length), {"weight": averages[length].module.weight.detach().clone()})
                     for length in (0.05, 0.10)]
    profiles, states = zip(*kept, strict=True)
    for wanted, truth in ((0.07, averages[0.07]), (0.05, averages[0.05])):
        made = combine(states, combination(profiles, (1600, wanted)))
        assert made["weight"].item() == pytest.approx(truth.module.weight.item(), rel=0.01)


@pytest.mark.parametrize("change", [
    lambda s: s | {"step": "2"}, lambda s: s | {"step": 0}, lambda s: s | {"step": True}, lambda s: s | {"length": 0.4},
    lambda s: s | {"length": None}, lambda s: s | {"weights": []}, lambda s: s | {"weights": {}},
    lambda s: s | {"weights": {"w": torch.zeros(3)}}, lambda s: s | {"weights": {"w": torch.zeros(2).bool()}},
    lambda s: list(s.items())])
def test_odd_averages_are_one_line(tmp_path, change):
    network, whole = torch.nn.Module(), {"step": 1, "length": 0.05, "weights": {"w": torch.zeros(2)}}
    network.w = torch.nn.Parameter(torch.ones(2))
    files = [tmp_path / f"phema_{step}_{length}.pth" for step in (1, 2) for length in (0.05, 0.1)]
    for file in files:
        _, step, length = file.stem.split("_")
        torch.save({**whole, "step": int(step), "length": float(length)}, file)
    assert load_profile(network, files, 0.07).step == 2
    for file in (files[0], files[-1]):
        kept = file.read_bytes()
        torch.save(change({**whole}), file)
        with pytest.raises(DataError, match=f"{file.name}: no power-function average|another network"):
            load_profile(network, files, 0.07)
        file.write_bytes(kept)
