"""bf16: what auto chooses, that a run keeps it, that weights are cast once and to the same numbers; when compiling
earns itself back."""

import logging
from types import SimpleNamespace

import pytest
import torch

import train_ddp
from configs.schema import load_config
from models import build_model
from runners import compilation, network
from runners.compilation import layers_of, resolve_sampling_compile
from runners.diffusion import Diffusion
from runners.frozen import cast_once
from runners.network import Network, explain_amp, resolve_amp
from runners.training import session
from tests.conftest import TINY

CPU = torch.device("cpu")
SMALL = ["model.ch=32", "model.ch_mult=[1,2]", "model.num_res_blocks=1", "model.attn_resolutions=[8]",
         "data.image_size=16", "model.dropout=0"]
AUTO = ["--amp", "auto"]


@pytest.fixture
def cpu_has(monkeypatch):
    """``cpu_has("avx2", ...)``: the CPU's instruction sets, from here on."""
    return lambda *sets: monkeypatch.setattr(network, "instruction_sets", lambda: list(sets))


@pytest.mark.parametrize("sets, chosen", [
    (["avx2"], None), (["avx2", "avx512f"], None), ([], None), (["avx2", "avx512f", "avx512_bf16"], torch.bfloat16),
    (["avx2", "avx512f", "avx512_bf16", "amx_bf16"], torch.bfloat16)])
def test_amp_auto_on_a_cpu(cpu_has, sets, chosen):
    cpu_has(*sets)
    assert resolve_amp("auto", CPU) is chosen and resolve_amp("off", CPU) is None
    assert (sets[-1] in explain_amp("auto", CPU)) if chosen else "neither" in explain_amp("auto", CPU)


def train(exp, *flags):
    assert train_ddp.main([*TINY, "--exp", str(exp), *flags]) == 0
    return torch.load(exp / "logs" / "digits" / "ckpt.pth", weights_only=True)


def same(a, b):
    return all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


def test_a_resumed_run_keeps_what_auto_chose(cpu_has, tmp_path, monkeypatch, capsys):
    """The network is made with it: in float32 a GPU must be told to leave out TF32."""
    made = []
    monkeypatch.setattr(session, "Network", lambda model, device, amp, **more: made.append(amp) or Network(
        model, device, amp, **more))
    cpu_has("avx512_bf16")
    whole = train(tmp_path / "whole", *AUTO, "--training.max_steps", "4")
    train(tmp_path / "moved", *AUTO, "--training.max_steps", "4", "--max_steps", "2")
    cpu_has("avx2")                                            # on another machine, whose auto would be off
    moved = train(tmp_path / "moved", *AUTO, "--training.max_steps", "4", "--resume_training", "--verbose", "info")
    told = capsys.readouterr().err
    assert told.count("amp auto") == 1 and "amp auto: bf16, as the run began" in told
    assert whole["amp"] == moved["amp"] == "bf16" and same(whole, moved) and made == [torch.bfloat16] * 3
    off = train(tmp_path / "off", "--amp", "off", "--training.max_steps", "4")
    assert off["amp"] == "off" and not same(whole, off)


def test_a_run_from_before_auto_meant_bf16_stays_in_float32(cpu_has, tmp_path):
    cpu_has("avx2")
    whole = train(tmp_path / "whole", *AUTO, "--training.max_steps", "4")
    path = tmp_path / "old" / "logs" / "digits" / "ckpt.pth"
    old = train(tmp_path / "old", *AUTO, "--training.max_steps", "4", "--max_steps", "2")
    del old["amp"]
    torch.save(old, path)
    cpu_has("avx512_bf16")
    assert same(whole, train(tmp_path / "old", *AUTO, "--training.max_steps", "4", "--resume_training"))


FAMILIES = {
    "digits.yml": SMALL, "digits_cond.yml": SMALL, "adm/imagenet64.yml": [
        "model.num_channels=32", "model.channel_mult=[1,2]", "model.num_res_blocks=1",
        "model.attention_resolutions=[8]", "model.num_head_channels=16", "data.image_size=16", "model.dropout=0"]}
FAMILIES |= {f"edm/{name}.yml": [
    "model.model_channels=32", "model.channel_mult=[1,2]", "model.num_blocks=1", "model.attn_resolutions=[8]",
    "data.image_size=16", "model.dropout=0"] for name in ("cifar10_ddpmpp_cond", "cifar10_ncsnpp", "imagenet64_adm")}


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_cast_once_give_the_numbers_of_autocast(name):
    torch.manual_seed(0)
    config = load_config(name, FAMILIES[name])
    model = build_model(config).eval()
    for parameter in model.parameters():                       # families begin with zeros, which would hide much
        torch.nn.init.normal_(parameter, std=0.05)
    x, t = torch.randn(3, *config.data.shape), torch.tensor([3.0, 500.0, 999.0])
    condition = {"labels": torch.tensor([0, 1, 2])} if config.model.num_labels else {}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    each, once = (Network(model, CPU, torch.bfloat16, frozen=frozen) for frozen in (False, True))
    with torch.no_grad():
        for _ in range(2):                                     # the call that casts, and one after it
            torch.testing.assert_close(once(x, t, **condition), each(x, t, **condition), rtol=0, atol=0)
    assert any(value.dtype == torch.bfloat16 for value in once.module.state_dict().values())
    assert all(value.dtype == before[name].dtype and torch.equal(value, before[name])
               for name, value in model.state_dict().items())


def test_what_autocast_leaves_alone_stays_as_it_is_and_shared():
    model = build_model(load_config("digits.yml", SMALL)).eval()
    copied = cast_once(model, torch.bfloat16, torch.zeros(2, 1, 16, 16), torch.zeros(2), {})
    assert copied.conv_in.weight.dtype == copied.mid.attn_1.q.bias.dtype == torch.bfloat16
    for mine, theirs in ((copied.temb.dense[0], model.temb.dense[0]), (copied.norm_out, model.norm_out)):
        assert mine.weight is theirs.weight and mine.weight.dtype == torch.float32
    assert not any(layer._forward_pre_hooks for layer in copied.modules())


def test_sampling_casts_the_averaged_weights_and_training_does_not():
    diffusion = Diffusion(load_config("digits.yml", SMALL), "cpu")
    assert not diffusion.network().to_be_cast                  # float32 by default
    diffusion.amp = torch.bfloat16
    assert diffusion.network().to_be_cast
    assert not Network(diffusion.model, CPU, torch.bfloat16).to_be_cast


def weighing(monkeypatch, caplog, seconds, images, amp=torch.bfloat16, batch=10):
    model = torch.nn.Sequential(*[torch.nn.Linear(1, 1) for _ in range(100)])             # 50 s to compile
    monkeypatch.setattr(compilation, "seconds_of_a_call", lambda sampler: seconds)
    monkeypatch.setattr(compilation, "SECONDS_FOR_A_LAYER", 0.5)
    monkeypatch.setattr(compilation, "SAVED", {torch.bfloat16: 0.1, None: 0.0})
    monkeypatch.setattr(compilation.shutil, "which", lambda name: "/usr/bin/" + name)
    diffusion = SimpleNamespace(device=CPU, amp=amp, model=model)
    with caplog.at_level(logging.INFO):
        return resolve_sampling_compile("auto", diffusion, SimpleNamespace(calls=50), images, batch)


@pytest.mark.parametrize("seconds, images, worth_it", [
    (0.1, 90, False), (0.1, 110, True),                        # it saves 45 s, 55 s
    (0.1, 115, False), (0.1, 230, True),                       # a last, smaller batch compiles again: 100 s
    (0.001, 5000, False)])
def test_compile_auto_weighs_what_it_takes_and_saves(monkeypatch, caplog, seconds, images, worth_it):
    assert weighing(monkeypatch, caplog, seconds, images) == worth_it
    assert "it would take some" in caplog.text


def test_compile_auto_needs_bf16_many_calls_and_a_compiler(monkeypatch, caplog):
    assert not weighing(monkeypatch, caplog, 10.0, 1000, amp=None) and "float32" in caplog.text
    assert not weighing(monkeypatch, caplog, 10.0, 30) and "1500 calls with one image" in caplog.text


def test_layers_with_weights_are_counted():
    assert layers_of(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.GroupNorm(1, 2))) == 2
