"""The network against the published implementation's numbers, and against itself in every form it is run in."""

import pytest
import torch

from configs.schema import Config
from models import build_model
from models.unet import Dropout, sinusoidal_embedding
from tests.conftest import golden_names


def make_config(image_size=16, **model) -> Config:
    settings = dict(in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[8], dropout=0.0)
    settings |= model
    return Config(data={"dataset": "DIGITS", "image_size": image_size, "channels": settings["in_channels"]},
                  model=settings)


def make_model(**settings) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(make_config(**settings)).eval()


def relative_error(given, expected) -> float:
    return ((given - expected).abs().max() / expected.abs().mean()).item()


@pytest.fixture(params=golden_names("unet_a", "unet_grey"))
def published(request, golden):
    """A fresh network and the published implementation's ``{config, state_dict, x, t, out}``."""
    values = golden(request.param)
    return build_model(make_config(**values["config"])).eval(), values


@torch.no_grad()
def test_reproduces_the_published_implementation(published):
    model, values = published
    assert list(model.state_dict()) == list(values["state_dict"])        # order too: SA-DPM's EMA goes by index
    model.load_state_dict(values["state_dict"])
    assert relative_error(model(values["x"], values["t"]), values["out"]) < 3e-5


@torch.no_grad()
def test_integer_steps_and_channels_last_and_batch_composition_do_not_matter(published):
    model, values = published
    model.load_state_dict(values["state_dict"])
    x, t = values["x"], values["t"]
    assert torch.equal(model(x, t.long()), model(x, t))
    single = torch.cat([model(x[i:i + 1], t[i:i + 1]) for i in range(len(x))])
    assert relative_error(single, values["out"]) < 3e-5
    out = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t)
    assert relative_error(out, values["out"]) < 3e-5


@pytest.mark.parametrize(("ch_mult", "image_size", "count"), [
    ([1, 2, 2, 2], 32, 35_746_307),             # DDPM: 35.7 M
    ([1, 1, 2, 2, 4, 4], 256, 113_673_219),     # DDPM: 114 M
])
def test_published_parameter_counts(ch_mult, image_size, count):
    config = make_config(image_size, ch=128, ch_mult=ch_mult, num_res_blocks=2, attn_resolutions=[16])
    with torch.device("meta"):
        model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) == count


def test_every_parameter_gets_a_gradient():
    model = make_model().train()
    model(torch.randn(2, 3, 16, 16), torch.tensor([3, 700])).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_dropout_acts_in_training_only():
    model = make_model(dropout=0.5)
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([5])
    assert torch.equal(model(x, t), model(x, t))
    model.train()
    assert not torch.equal(model(x, t), model(x, t))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_independently_and_keeps_the_mean(p, layout):
    torch.manual_seed(0)
    x = torch.ones(8, 64, 32, 32).contiguous(memory_format=layout).requires_grad_()
    out = Dropout(p)(x)
    out.sum().backward()
    kept = (out != 0).double()
    share = round(2**16 * (1 - p)) / 2**16
    assert out.stride() == x.stride() and torch.equal(out, x.grad)
    assert torch.equal(out, kept.float() * (1 / share))
    error = (share * (1 - share) / x.numel()) ** 0.5                     # standard error of the mean
    assert abs(kept.mean() - share) < 5 * error
    for dim, shift in [(0, 1), (1, 1), (1, 2), (1, 3), (2, 1), (3, 1), (3, 2), (3, 3)]:      # four share one draw
        covariance = ((kept - share) * (kept - share).roll(shift, dim)).mean()
        assert abs(covariance) < 5 * (share * (1 - share)) / x.numel() ** 0.5


def test_dropout_in_bf16():
    torch.manual_seed(0)
    out = Dropout(0.1)(torch.ones(8, 64, 32, 32, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and abs((out == 0).double().mean() - 0.1) < 5 * (0.09 / out.numel()) ** 0.5
    assert out.max() == torch.tensor(1 / 0.9, dtype=torch.bfloat16)


@pytest.mark.parametrize("size", [(16, 8), (8, 16)])
def test_longer_side_decides_where_attention_is(size):
    model = make_model(image_size=size, attn_resolutions=[8])
    assert [len(level.attn) for level in model.down] == [0, 1]           # 16 -> 8 on the longer side
    assert model(torch.randn(2, 3, *size), torch.tensor([0, 999])).shape == (2, 3, *size)


def test_bf16_autocast_keeps_the_steps_apart_and_stays_close():
    model, x = make_model(), torch.randn(2, 3, 16, 16)
    t = torch.tensor([998, 999])                                         # the same number in bf16
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        temb, out = model.temb(t), model(x, t)
    assert temb.dtype == torch.float32
    assert torch.equal(temb, model.temb(t))
    assert not torch.equal(temb[0], temb[1])
    with torch.no_grad():
        assert relative_error(out.float(), model(x, t)) < 0.1


def test_whole_network_in_bf16():
    out = make_model().bfloat16()(torch.randn(1, 3, 16, 16, dtype=torch.bfloat16), torch.tensor([7]))
    assert out.dtype == torch.bfloat16


def test_activation_checkpointing_changes_no_gradient():
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    gradients = []
    for checkpointing in (False, True):
        model = make_model(dropout=0.3).train()
        model.checkpointing = checkpointing
        torch.manual_seed(1)
        model(x, t).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_sinusoidal_embedding_closed_form():
    out = sinusoidal_embedding(torch.tensor([0, 100]), 4)                # frequencies 1 and 1/10000
    expected = torch.tensor([[0, 0, 1, 1], [100, 0.01, 100, 0.01]])
    expected[1] = torch.cat([expected[1, :2].sin(), expected[1, 2:].cos()])
    assert torch.allclose(out, expected, atol=1e-6)


def test_labels_shift_the_embedding_and_minus_one_is_no_label():
    model = make_model(num_classes=3)
    x, t = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 500.0, 900.0])
    with torch.no_grad():
        given, none, bare = (model(x, t, labels) for labels in (torch.tensor([2, -1, 0]), torch.tensor([-1] * 3), None))
    assert torch.equal(given[1], none[1]) and torch.equal(none, bare)
    assert not torch.equal(given[0], none[0]) and not torch.equal(given[2], none[2])
    assert set(model.state_dict()) - set(make_model().state_dict()) == {"label_emb.weight"}
