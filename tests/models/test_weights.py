"""Every checkpoint format, made by hand as the program that writes it does, and every way a file can be wrong."""

import argparse
import json
import os
import pickle

import pytest
import torch
from torch import nn

from configs.schema import Config
from models import build_model, load_weights, weights_fingerprint
from utils.errors import DataError, UserError


def make_model(seed: int, ch_mult=(1, 2)) -> nn.Module:
    torch.manual_seed(seed)
    settings = {"ch": 32, "ch_mult": list(ch_mult), "num_res_blocks": 1, "attn_resolutions": [4], "dropout": 0.0}
    return build_model(Config(data={"dataset": "DIGITS", "image_size": 8}, model=settings)).eval()


RAW, EMA = make_model(1).state_dict(), make_model(2).state_dict()


def prefixed(state, prefix="module."):
    return {prefix + name: tensor for name, tensor in state.items()}


def ours(ema=EMA):
    return {"format_version": 1, "config": {"data": {"image_size": 8}}, "step": 70, "epoch": 7, "model": RAW,
            "ema": ema, "optimizer": {"state": {0: {"step": torch.tensor(70.0)}}, "param_groups": []}}


def sa_dpm(ema=EMA):
    state = {i: {"step": 70, "exp_avg": torch.zeros(1)} for i in range(len(RAW))}
    for i, tensor in enumerate(ema.values() if ema else ()):
        state[i]["ema"] = tensor
    optimizer = {"state": state, "param_groups": [{"lr": 2e-4, "params": list(range(len(RAW)))}]}
    return {"epoch": 7, "global_step": 70, "args": argparse.Namespace(doc="celeba_sa", lamda=1.0),
            "model_dict": prefixed(RAW), "optimizer": optimizer, "scheduler": {"last_epoch": 7}}


def ddim(*ema):
    return [prefixed(RAW), {"state": {}, "param_groups": []}, 7, 70, *ema]


# file name, content, info when EMA is asked for, info when raw is asked for: (format, kind, step, epoch)
READABLE = {
    "ours": ("ckpt_7.pth", ours(), ("sa-ddim", "ema", 70, 7), ("sa-ddim", "raw", 70, 7)),
    "ours without ema": ("ckpt.pth", ours(ema=None), *[("sa-ddim", "raw", 70, 7)] * 2),
    "our ema file": ("model_7_ema.pth", EMA, *[("sa-ddim-ema", "ema", None, 7)] * 2),
    "sa-dpm": ("ckpt.pth", sa_dpm(), ("sa-dpm", "ema", 70, 7), ("sa-dpm", "raw", 70, 7)),
    "sa-dpm without ema": ("ckpt.pth", sa_dpm(ema=None), *[("sa-dpm", "raw", 70, 7)] * 2),
    "sa-dpm ema file": ("model_1500_ema.pth", prefixed(EMA), *[("sa-dpm-ema", "ema", None, 1500)] * 2),
    "ddim": ("ckpt.pth", ddim(EMA), ("ddim", "ema", 70, 7), ("ddim", "raw", 70, 7)),
    "pesser": ("model-790000.ckpt", RAW, *[("state-dict", "unknown", None, None)] * 2),
    "compiled under ddp": ("w.pth", prefixed(RAW, "module._orig_mod."), *[("state-dict", "unknown", None, None)] * 2),
}


def holds(model, state) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("case", READABLE)
def test_reads(case, ema, tmp_path):
    name, content, *expected = READABLE[case]
    torch.save(content, tmp_path / name)
    model = make_model(3)
    info = load_weights(model, tmp_path / name, ema=ema)
    assert (info.format, info.kind, info.step, info.epoch) == expected[0 if ema else 1]
    state = EMA if info.kind == "ema" else RAW
    assert holds(model, state)
    assert info.fingerprint == weights_fingerprint(state)


def test_ddim_without_ema(tmp_path):
    torch.save(ddim(), tmp_path / "ckpt.pth")
    model = make_model(3)
    with pytest.raises(UserError, match="saved without EMA weights") as error:
        load_weights(model, tmp_path / "ckpt.pth")
    assert error.value.code == 2
    assert load_weights(model, tmp_path / "ckpt.pth", ema=False).kind == "raw"
    assert holds(model, RAW)


def test_wrapped_model_takes_bare_names(tmp_path):
    class Wrapper(nn.Module):                     # as DistributedDataParallel names it
        def __init__(self, module):
            super().__init__()
            self.module = module

    torch.save(RAW, tmp_path / "w.pth")
    model = make_model(3)
    load_weights(Wrapper(model), tmp_path / "w.pth")
    assert holds(model, RAW)


def test_half_precision_file_fills_a_float_network(tmp_path):
    torch.save({name: tensor.half() for name, tensor in RAW.items()}, tmp_path / "w.pth")
    model = make_model(3)
    load_weights(model, tmp_path / "w.pth")
    assert holds(model, {name: tensor.half().float() for name, tensor in RAW.items()})


# diffusers

@pytest.fixture(scope="module")
def diffusers_network():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is in the dev extra")
    torch.manual_seed(5)
    return diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6).eval()


@torch.no_grad()
def assert_same_network(model, other):
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    expected = other(x, t).sample
    assert (model(x, t) - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("subfolder", ["", "unet"])
def test_reads_diffusers(safe, subfolder, diffusers_network, tmp_path):
    diffusers_network.save_pretrained(tmp_path / subfolder, safe_serialization=safe)
    model = make_model(3)
    info = load_weights(model, tmp_path)
    assert (info.format, info.kind, info.step, info.epoch) == ("diffusers", "unknown", None, None)
    assert_same_network(model, diffusers_network)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    assert load_weights(model, tmp_path / "w.pth").fingerprint == info.fingerprint


def test_reads_the_older_attention_names_of_diffusers(diffusers_network, tmp_path):
    diffusers_network.save_config(tmp_path)
    older = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = diffusers_network.state_dict()
    for new, old in older.items():
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    assert any("query" in name for name in state)
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    model = make_model(3)
    load_weights(model, tmp_path)
    assert_same_network(model, diffusers_network)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("flip_sin_to_cos", True, "flip_sin_to_cos is True, needed False"),
    ("freq_shift", 0, "freq_shift is 0, needed 1"),
    ("downsample_padding", 1, "downsample_padding is 1, needed 0"),
    ("norm_eps", 1e-5, "norm_eps is 1e-05, needed 1e-06"),
    ("norm_num_groups", 16, "norm_num_groups is 16, needed 32"),
    ("attention_head_dim", 8, "attention_head_dim is 8, needed None"),
])
def test_refuses_diffusers_networks_that_compute_something_else(key, value, message, diffusers_network, tmp_path):
    diffusers_network.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {key: value}))
    with pytest.raises(DataError, match=message):
        load_weights(make_model(3), tmp_path)


def test_absent_diffusers_settings_count_as_its_defaults(diffusers_network, tmp_path):
    diffusers_network.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="attention_head_dim is 8.*freq_shift is 0"):
        load_weights(make_model(3), tmp_path)


@pytest.mark.parametrize(("config", "weights", "message"), [
    ("[1]", None, "config.json: cannot be read"),
    ("{", None, "config.json: cannot be read"),
    (None, b"text", "safetensors: not loaded"),
    (None, b"\xff" * 64, "safetensors: not loaded"),
])
def test_refuses_broken_diffusers_folders(config, weights, message, diffusers_network, tmp_path):
    diffusers_network.save_pretrained(tmp_path)
    if config:
        (tmp_path / "config.json").write_text(config)
    if weights:
        (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    with pytest.raises(DataError, match=message):
        load_weights(make_model(3), tmp_path)


# What must be refused

def refused(tmp_path, content, name="ckpt.pth") -> str:
    """The one line of the DataError; nothing may have been loaded."""
    torch.save(content, tmp_path / name)
    model = make_model(3)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(DataError) as error:
        load_weights(model, tmp_path / name)
    assert error.value.code == 3
    assert holds(model, before)
    message = str(error.value)
    assert str(tmp_path / name) in message and "\n" not in message and len(message) < 600 + len(str(tmp_path))
    return message


def test_lists_what_is_missing_unexpected_and_of_another_shape_shortened(tmp_path):
    state = dict(RAW) | {"class_embedding.weight": torch.zeros(10, 4), "conv_in.weight": torch.zeros(64, 3, 3, 3)}
    for name in ("conv_out.bias", "conv_out.weight", "norm_out.bias", "norm_out.weight"):
        del state[name]
    message = refused(tmp_path, state)
    assert "4 missing: conv_out.bias, conv_out.weight, norm_out.bias, ..." in message
    assert "1 unexpected: class_embedding.weight" in message
    assert "1 of another shape: conv_in.weight 64x3x3x3 instead of 32x3x3x3" in message


def test_refuses_another_network(tmp_path):
    assert "missing" in refused(tmp_path, make_model(1, ch_mult=(1,)).state_dict())


@pytest.mark.parametrize("content", [{}, [], 3, {"a": 1}, [RAW, {}, 7], {"model": 5}, None], ids=str)
def test_refuses_what_is_no_checkpoint(content, tmp_path):
    refused(tmp_path, content)


@pytest.mark.parametrize("content", [
    {"format_version": 1, "model": 5}, {"format_version": 1, "model": RAW, "ema": [1]}, {"model_dict": []},
    [1, 2, 3, 4, 5], [RAW, {}, 7, 70, None],
], ids=["model", "ema", "model_dict", "numbers", "ema None"])
def test_refuses_checkpoints_with_something_else_inside(content, tmp_path):
    assert "no state dict of tensors" in refused(tmp_path, content)


def test_refuses_incomplete_averages_of_sa_dpm(tmp_path):
    content = sa_dpm()
    del content["optimizer"]["state"][4]["ema"]
    assert f"{len(RAW) - 1} averaged tensors do not match its {len(RAW)} parameters" in refused(tmp_path, content)


def test_refuses_integers(tmp_path):
    assert "1 not dense floats: conv_in.bias" in refused(tmp_path, RAW | {"conv_in.bias": RAW["conv_in.bias"].int()})


@pytest.mark.parametrize("name", ["ckpt.pth", "model_7_ema.pth"])
def test_refuses_text_empty_and_truncated_files(name, tmp_path):
    torch.save(RAW, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for content in (b"not a checkpoint\n", b"", whole[:len(whole) // 2], whole[:100]):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            load_weights(make_model(3), tmp_path / name)


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [
    torch.save, lambda content, path: path.write_bytes(pickle.dumps(content)),
    lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
], ids=["torch", "pickle", "torch legacy"])
def test_runs_no_code_from_the_file(save, tmp_path):
    save(dict(RAW) | {"payload": Payload(tmp_path / "owned")}, tmp_path / "ckpt.pth")
    with pytest.raises(DataError, match="only tensors and plain values"):
        load_weights(make_model(3), tmp_path / "ckpt.pth")
    assert not (tmp_path / "owned").exists()


def test_missing_file_is_the_requests_fault(tmp_path):
    with pytest.raises(UserError, match=r"no such weights: .*ckpt_5\.pth") as error:
        load_weights(make_model(3), tmp_path / "ckpt_5.pth")
    assert error.value.code == 2


def test_folder_that_is_no_diffusers_folder(tmp_path):
    with pytest.raises(DataError, match="holds no weights in a known form; known: edm, diffusers, sa-ddim"):
        load_weights(make_model(3), tmp_path)


def test_fingerprint_sees_names_shapes_types_and_values():
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(1)}
    others = [{"a": torch.zeros(3, 2), "b": torch.zeros(1)}, {"a": torch.zeros(2, 3), "c": torch.zeros(1)},
              {"a": torch.zeros(2, 3).bfloat16(), "b": torch.zeros(1)}, {"a": torch.zeros(2, 3), "b": torch.ones(1)}]
    fingerprints = {weights_fingerprint(s) for s in (state, *others)}
    assert len(fingerprints) == 5
    reordered = {"b": torch.zeros(1), "a": torch.zeros(3, 2).t()}        # another order, another memory layout
    assert weights_fingerprint(reordered) == weights_fingerprint(state)
    assert len(weights_fingerprint(state)) == 16
