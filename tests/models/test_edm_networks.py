"""SongUNet and DhariwalUNet against the published networks' numbers, and what they promise beside."""

import logging

import pytest
import torch

from models.dhariwal import DhariwalUNet
from models.song import SongUNet
from tests.edm_cases import build, cases, error

SMALL = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "channel_mult": (1, 2),
         "num_blocks": 1, "attn_resolutions": (4,), "label_dim": 4, "augment_dim": 9}
NCSNPP = {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual",
          "resample_filter": (1, 3, 3, 1)}
KINDS = {"ddpmpp": lambda **more: SongUNet(**SMALL | more), "ncsnpp": lambda **more: SongUNet(**SMALL | NCSNPP | more),
         "adm": lambda **more: DhariwalUNet(**SMALL | more)}


def alive(kind, **more):
    """A network whose last layers do something, and whose output therefore depends on everything."""
    torch.manual_seed(0)
    model = KINDS[kind](**more)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs(batch=3):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(batch, 3, 8, 8, generator=generator), torch.rand(batch, generator=generator) * 5,
            torch.arange(batch), torch.randn(batch, 9, generator=generator))


@pytest.mark.parametrize("case", cases("networks", "network"))
def test_output_is_the_published_one(case):
    model = build(case)
    assert sum(p.numel() for p in model.parameters()) == case["num_parameters"]
    with torch.no_grad():
        out = model(scaled_input(case), case["c_noise"], case["class_labels"], case["augment_labels"])
    assert error(out, case["F_x"]) < 1e-4


def scaled_input(case):
    sigma = case["sigma"].view(-1, 1, 1, 1)
    c_in = {"EDMPrecond": (sigma**2 + 0.25) ** -0.5, "VEPrecond": 1.0}.get(case["class_name"], (sigma**2 + 1) ** -0.5)
    return c_in * case["x"]


@pytest.mark.parametrize("case", cases("misc", "preset"))
def test_published_networks_have_our_names_and_shapes_in_order(case):
    with torch.device("meta"):
        model = build(case)
    shapes = {f"model.{name}": list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert list(shapes.items()) == list(case["shapes"].items())


@pytest.mark.parametrize("case", cases("misc", "init"))
def test_initial_weights_are_spread_as_published(case):
    torch.manual_seed(0)
    parameters = dict(build({"class_name": "EDMPrecond", **case}).named_parameters())
    assert [f"model.{name}" for name in parameters] == list(case["statistics"])
    for name, (_, std, largest) in case["statistics"].items():
        tensor = parameters[name.removeprefix("model.")].detach()
        if std == 0:
            assert (tensor == largest).all()
        else:                                                  # of n uniform or normal numbers it varies by 1/sqrt(2n)
            assert abs(tensor.std().item() / std - 1) < 4 / tensor.numel()**0.5
            assert tensor.abs().max() < 1.5 * largest


def test_fourier_frequencies_are_drawn_with_deviation_16():
    torch.manual_seed(0)
    frequencies = SongUNet(**SMALL | NCSNPP | {"model_channels": 512, "num_blocks": 1}).map_noise.freqs
    assert frequencies.shape == (512,) and abs(frequencies.std().item() - 16) < 2


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_numbers_or_vectors_and_minus_one_is_none(kind):
    model, (x, t, labels, augment) = alive(kind).eval(), inputs()
    with torch.no_grad():
        as_numbers, as_vectors = model(x, t, labels), model(x, t, torch.eye(4)[labels])
        none, absent = model(x, t, torch.full((3,), -1)), model(x, t)
    assert torch.equal(as_numbers, as_vectors) and torch.equal(none, absent)
    assert error(as_numbers, none) > 1e-3
    assert error(model(x, t, labels, augment), as_numbers) > 1e-3
    without = alive(kind, label_dim=0, augment_dim=0).eval()
    assert torch.equal(without(x, t, labels, augment), without(x, t))


@pytest.mark.parametrize("kind", KINDS)
def test_without_augmentation_every_weight_has_a_gradient(kind):
    """One without has no moments, and such a state cannot be gone on from."""
    network = alive(kind).eval()
    x, t, labels, augment = inputs()
    network(x, t, labels).square().mean().backward()
    assert network.map_augment and all(weight.grad is not None for weight in network.parameters())
    assert torch.equal(network(x, t, labels), network(x, t, labels, torch.zeros_like(augment)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rows_of_attention_have_the_stride_of_fused_kernels(monkeypatch, layout):
    """After a group norm in either layout: CUDA's returns the plain one."""
    block, seen = next(block for block in alive("ddpmpp").modules() if getattr(block, "has_attention", False)), []
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr("models.edm_blocks.F.scaled_dot_product_attention",
                        lambda *rows: seen.extend(rows) or attend(*rows))
    block.attend(torch.randn(2, block.qkv.in_channels, 4, 4).to(memory_format=layout))
    assert [row.stride(-1) for row in seen] == [1, 1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_memory_format_and_checkpointing_change_nothing(kind):
    model, (x, t, labels, augment) = alive(kind, dropout=0.0), inputs()
    results, calls = [], []
    next(iter(model.dec.values())).conv1.register_forward_hook(lambda *_: calls.append(model.checkpointing))
    for checkpointing, memory_format in ((False, torch.contiguous_format), (True, torch.channels_last)):
        model.checkpointing = checkpointing
        model.to(memory_format=memory_format).zero_grad()
        out = model(x.to(memory_format=memory_format), t, labels, augment)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    assert calls == [False, True, True]                        # once, and again in the backward pass
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= 3e-5 * one.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_in_one_graph(kind):
    model, (x, t, labels, augment) = alive(kind).eval(), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, t, labels, augment), model(x, t, labels, augment))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_the_embedding_in_float32(kind):
    model, (x, t, labels, augment) = alive(kind).eval(), inputs()
    with torch.no_grad():
        expected, emb = model(x, t, labels, augment), model.embed(t, labels, augment)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x, t, labels, augment)
            assert torch.equal(model.embed(t, labels, augment), emb) and emb.dtype == torch.float32
    assert out.dtype == torch.bfloat16 and 0 < error(out.float(), expected) < 0.1


def test_dropout_is_where_the_configuration_says():
    model, (x, t, *_) = alive("ddpmpp", dropout=0.5), inputs()
    assert not torch.equal(model(x, t), model(x, t))
    assert torch.equal(model.eval()(x, t), model(x, t))


def test_attention_that_does_not_exist_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        DhariwalUNet(**SMALL | {"channel_mult": (1, 1)})
    assert "no attention in blocks of 32 channels" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        DhariwalUNet(**SMALL)
        SongUNet(**SMALL | {"channel_mult": (1, 1)})
    assert not caplog.text


def test_impossible_widths_are_one_line():
    with pytest.raises(ValueError, match=r"224 channels cannot be divided into 3 attention heads; take a multiple of"):
        DhariwalUNet(**SMALL | {"channel_mult": (1, 7)})
    with pytest.raises(ValueError, match=r"33 channels cannot be normalised in 8 groups; take a multiple of 32"):
        SongUNet(**SMALL | {"model_channels": 33})
