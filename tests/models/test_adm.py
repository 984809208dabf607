"""ADM's network and classifier: guided-diffusion's numbers, names and start, and every form in which it is run."""

import pytest
import torch
import torch.nn.functional as F

from models.adm import ADMUNet
from models.adm_blocks import GroupNorm, timestep_embedding
from models.adm_classifier import ADMClassifier, AttentionPool
from tests.adm import arguments, cases, label, network, of_kind, relative_error

SMALL = {"image_size": 16, "in_channels": 3, "num_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2],
         "attention_resolutions": [8], "num_head_channels": 16}


def make_model(**options) -> ADMUNet:
    """With every parameter random: a fresh network gives zeros."""
    torch.manual_seed(0)
    model = ADMUNet(**SMALL | options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("case", cases("adm_unet"), ids=label)
def test_reproduces_the_published_implementation(case):
    labels = () if case["y"] is None else (case["y"],)
    assert relative_error(network(case)(case["x"], case["t"], *labels), case["out"]) < 3e-5


@pytest.mark.parametrize("case", of_kind("state_dict_shapes"), ids=label)
def test_names_shapes_and_counts_of_published_networks(case):
    with torch.device("meta"):
        state = ADMUNet(**arguments(case["flags"])).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {
        name: list(shape) for name, shape in case["shapes"].items()}
    assert list(state) == list(case["shapes"])                           # the order is that of optimizer files
    assert sum(tensor.numel() for tensor in state.values()) == case["parameters"]


@pytest.mark.parametrize("case", of_kind("timestep_embedding"), ids=label)
def test_timestep_embedding(case):
    assert torch.allclose(timestep_embedding(case["t"], case["dim"]), case["out"], rtol=0, atol=1e-6)
    assert torch.allclose(timestep_embedding(case["t"], case["dim_odd"]), case["out_odd"], rtol=0, atol=1e-6)


def test_frequencies_are_those_of_exact_arithmetic():
    """Where a float32 exp is an ulp off, t = 1000 turns it into 1e-4 of an angle."""
    exponent = torch.arange(32, dtype=torch.float32) * (-torch.log(torch.tensor(10000.0, dtype=torch.float64)) / 32)
    angles = 1000 * exponent.double().exp().float()
    assert torch.equal(timestep_embedding(torch.tensor([1000]), 64)[0], torch.cat([angles.cos(), angles.sin()]))


@pytest.mark.parametrize("case", of_kind("zero_initialised"), ids=label)
def test_a_fresh_network_has_the_published_zeros_and_gives_zero(case):
    model = ADMUNet(image_size=16, in_channels=3, num_channels=32, num_res_blocks=1, channel_mult=[1, 1],
                    attention_resolutions=[8], num_head_channels=16, resblock_updown=True, num_classes=10,
                    use_new_attention_order=True, learn_sigma=True)
    # Biases of normalisations are 0 as well, and are no part of the list.
    norms = {f"{name}.bias" for name, module in model.named_modules() if isinstance(module, GroupNorm)}
    zero = [name for name, p in model.named_parameters() if not p.any() and name not in norms]
    assert zero == list(case["names"])
    out = model(torch.randn(2, 3, 16, 16), torch.tensor([3, 700]), torch.tensor([0, 9]))
    assert out.shape == (2, 6, 16, 16) and not out.any()


@torch.no_grad()
@pytest.mark.parametrize("options", [
    {"resblock_updown": True, "use_new_attention_order": True}, {"num_heads": 2, "num_head_channels": -1},
    {"conv_resample": False, "use_scale_shift_norm": False}], ids=str)
def test_layout_and_batch_composition_do_not_matter(options):
    model = make_model(**options).double()
    x, t = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 20, 999])
    out = model(x, t)
    assert torch.allclose(torch.cat([model(x[i:i + 1], t[i:i + 1]) for i in range(3)]), out, atol=1e-12)
    last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t)
    assert torch.allclose(last, out, atol=1e-12) and last.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 8), (8, 16), (32, 32)])
def test_any_size_that_halves(size):
    assert make_model()(torch.randn(2, 3, *size), torch.tensor([0, 999])).shape == (2, 3, *size)


# Labels

@torch.no_grad()
def test_no_label_adds_nothing_to_the_embedding():
    with_classes, without = make_model(num_classes=5), make_model()
    without.load_state_dict({name: p for name, p in with_classes.state_dict().items() if name != "label_emb.weight"})
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([5, 5, 5])
    out = with_classes(x, t, torch.tensor([-1, 2, -1]))
    assert torch.equal(out[::2], without(x, t)[::2]) and not torch.equal(out[1], without(x, t)[1])


def test_labels_are_given_exactly_where_there_are_classes():
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([5])
    with pytest.raises(ValueError, match="labels are needed by a network with classes"):
        make_model(num_classes=5)(x, t)
    with pytest.raises(ValueError, match="labels were given to a network without classes"):
        make_model()(x, t, torch.tensor([0]))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="attention of width 64 does not divide into heads: .* num_head_channels 48"):
        make_model(num_head_channels=48)
    with pytest.raises(ValueError, match="attention of width 64 .* num_heads 5, num_head_channels -1"):
        make_model(num_heads=5, num_head_channels=-1)


# Precision

def test_embedding_normalisation_and_output_stay_float32_under_autocast():
    model, seen = make_model(learn_sigma=True, num_classes=5), {}
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out.dtype}))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.randn(2, 3, 16, 16), torch.tensor([998, 999]), torch.tensor([-1, 4]))
        emb = model.embed(torch.tensor([998, 999]), torch.tensor([-1, -1]))
    assert out.dtype == torch.float32 and not torch.equal(emb[0], emb[1])            # 998 and 999 are one in bf16
    full = {name for name, dtype in seen.items() if dtype == torch.float32}
    assert full == {name for name in seen if name.startswith(("time_embed", "out.")) or ".emb_layers." in name}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm_of_bf16_is_that_of_float32_rounded_once(layout):
    norm, x = GroupNorm(64), (3 * torch.randn(2, 64, 8, 8) + 50).bfloat16().contiguous(memory_format=layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given, expected = norm(x), norm(x.float())
    assert given.dtype == torch.bfloat16 and expected.dtype == torch.float32
    assert torch.allclose(given.float(), expected, rtol=2**-8, atol=1e-4)            # half an ulp of bf16


@torch.no_grad()
def test_bf16_stays_close():
    model, x, t = make_model(), torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, t)
    assert relative_error(out, model(x, t)) < 0.2
    assert model.bfloat16()(x.bfloat16(), t).dtype == torch.bfloat16


# Training

def test_every_parameter_gets_a_gradient():
    model = make_model(num_classes=5, resblock_updown=True, learn_sigma=True).train()
    model(torch.randn(2, 3, 16, 16), torch.tensor([3, 700]), torch.tensor([1, 2])).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_activation_checkpointing_computes_twice_and_changes_no_gradient():
    x, t, gradients = torch.randn(2, 3, 16, 16), torch.tensor([3, 700]), []
    for checkpointing in (False, True):
        model, calls = make_model(dropout=0.3).train(), []
        model.middle_block[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.checkpointing = checkpointing
        torch.manual_seed(1)
        model(x, t).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        assert len(calls) == 1 + checkpointing
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_dropout_acts_in_training_only():
    model, x, t = make_model(dropout=0.5), torch.randn(1, 3, 16, 16), torch.tensor([5])
    assert torch.equal(model(x, t), model(x, t))
    assert not torch.equal(model.train()(x, t), model(x, t))


# The noisy classifier

CLASSIFIER = {"image_size": 16, "in_channels": 3, "num_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2],
              "attention_resolutions": [8], "num_head_channels": 32, "resblock_updown": True}


def test_classifier_names_are_guided_diffusions():
    state = ADMClassifier(**CLASSIFIER, num_outputs=10).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith("out.2.")}
    assert shapes == {"out.2.positional_embedding": (64, 65), "out.2.qkv_proj.weight": (192, 64, 1),
                      "out.2.qkv_proj.bias": (192,), "out.2.c_proj.weight": (10, 64, 1), "out.2.c_proj.bias": (10,)}
    unet = ADMUNet(**CLASSIFIER).state_dict()
    encoder = {name for name in unet if not name.startswith(("output_blocks", "out."))}
    assert encoder == {name for name in state if not name.startswith("out.")}


def test_attention_pooling_by_hand():
    torch.manual_seed(0)
    pool, x = AttentionPool(side=2, width=8, head_width=4, classes=3).double(), torch.randn(2, 8, 2, 2).double()
    rows = torch.cat([x.flatten(2).mean(2, keepdim=True), x.flatten(2)], 2) + pool.positional_embedding   # (2, 8, 5)
    q, k, v = F.conv1d(rows, pool.qkv_proj.weight, pool.qkv_proj.bias).chunk(3, 1)           # all q, all k, all v
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        attention = torch.softmax(torch.einsum("bcn,bcm->bnm", q[:, part], k[:, part]) / 2, dim=2)
        heads.append(torch.einsum("bnm,bcm->bcn", attention, v[:, part]))
    expected = F.conv1d(torch.cat(heads, 1), pool.c_proj.weight, pool.c_proj.bias)[:, :, 0]
    assert torch.allclose(pool(x), expected, atol=1e-12)


def test_classifier_has_a_gradient_for_its_input():
    torch.manual_seed(0)
    classifier = ADMClassifier(**CLASSIFIER, num_outputs=10)
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    logits = classifier(x, torch.tensor([3, 700]))
    logits.log_softmax(1)[:, 4].sum().backward()
    assert logits.shape == (2, 10) and x.grad.abs().amax((1, 2, 3)).min() > 0
