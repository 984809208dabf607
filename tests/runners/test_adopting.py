"""Full states of DDIM and SA-DPM, written as these programs do, are gone on from; --init_from with and without moments.

They are made of a state of this program, so that going on from either must give the same weights bit for bit.
"""

import argparse
import logging
import shutil

import pytest
import torch
import yaml

import generate
import train_ddp
from configs.schema import load_config
from tests.conftest import TINY

PLAIN = ["--training.sample_num", "0", "--training.log_freq", "1", "--optim.lr", "1e-3", "--optim.lr_schedule",
         "constant", "--optim.warmup_steps", "0", "--num_consecutive_steps", "2", "--lamda", "0.5"]


def train(exp, *flags, level="critical"):
    return train_ddp.main([*TINY, *PLAIN, "--exp", str(exp), *flags, "--verbose", level])


def state(exp, doc="digits"):
    return torch.load(exp / "logs" / doc / "ckpt.pth", weights_only=True)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A run of this program after two steps."""
    exp = tmp_path_factory.mktemp("ours")
    assert train(exp, "--max_steps", "2") == 0
    return exp


def as_sa_dpm(state: dict):
    slots = {i: {**each, "step": int(each["step"]), "ema": state["ema"][name]}
             for (i, each), name in zip(state["optimizer"]["state"].items(), state["model"], strict=True)}
    return {"epoch": 0, "global_step": state["step"], "args": argparse.Namespace(doc="x", lamda=1.0),
            "model_dict": {f"module.{name}": tensor for name, tensor in state["model"].items()},
            "optimizer": {"state": slots, "param_groups": [{"lr": 1e-3, "params": list(slots)}]}}


def as_ddim(state: dict):
    slots = {i: {**each, "step": int(each["step"])} for i, each in state["optimizer"]["state"].items()}
    return [{f"module.{name}": tensor for name, tensor in state["model"].items()},
            {"state": slots, "param_groups": [{"lr": 1e-3, "params": list(slots)}]}, 0, state["step"], state["ema"]]


def as_namespace(config) -> str:
    """A config.yml as both programs dump it: tagged Namespaces, with objects of the run in it, without a loss."""
    raw = config.model_dump(mode="json")
    average, = raw["training"].pop("ema")
    raw["model"] |= {"ema": True, "ema_rate": average["rate"]}
    keep = {"data": ("dataset", "image_size", "channels", "random_flip", "num_workers"),
            "model": ("in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "dropout", "ema",
                      "ema_rate"),
            "diffusion": ("beta_schedule", "beta_start", "beta_end", "num_diffusion_timesteps"),
            "training": ("batch_size", "n_epochs", "snapshot_freq"), "optim": ("optimizer", "lr", "grad_clip", "eps"),
            "sampling": ("batch_size",)}
    lines = ["!!python/object:argparse.Namespace"]
    for section, keys in keep.items():
        lines.append(f"{section}: !!python/object:argparse.Namespace")
        body = yaml.safe_dump({key: raw[section][key] for key in keys if key in raw[section]}, default_flow_style=None)
        lines += ["  " + line for line in body.splitlines()]
    return "\n".join([*lines, "device: !!python/object/apply:torch.device", "- cpu", ""])


@pytest.fixture(params=[as_sa_dpm, as_ddim], ids=["sa-dpm", "ddim"])
def foreign(request, ours, tmp_path):
    """exp/logs/digits as the other program left it, and the program's name."""
    folder = tmp_path / "logs" / "digits"
    folder.mkdir(parents=True)
    torch.save(request.param(state(ours)), folder / "ckpt.pth")
    shutil.copy(folder / "ckpt.pth", folder / "ckpt_2.pth")
    (folder / "config.yml").write_text(as_namespace(load_config(ours / "logs" / "digits" / "config.yml")))
    (folder / "stdout.txt").write_text("their log\n")
    return tmp_path


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_of_another_program_goes_on_as_one_of_ours(foreign, ours, tmp_path_factory, caplog, capsys):
    mine = tmp_path_factory.mktemp("mine") / "exp"
    shutil.copytree(ours, mine)
    assert train(mine, "--resume_training", "--max_steps", "4") == 0
    before = (foreign / "logs" / "digits" / "ckpt.pth").read_bytes()
    with caplog.at_level(logging.INFO):
        assert train(foreign, "--resume_training", "--max_steps", "4", level="info") == 0, capsys.readouterr().err
    a, b = state(mine), state(foreign)
    assert b["step"] == 4 and same(a["model"], b["model"]) and same(a["ema"], b["ema"])
    assert all(same(x, y) for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(),
                                          strict=True))
    assert "step 2, epoch 0" in caplog.text and "the moments exp_avg and exp_avg_sq" in caplog.text
    assert "their EMA" in caplog.text
    backup, = (foreign / "logs").glob("digits.bak-*")
    assert (backup / "ckpt.pth").read_bytes() == before and (backup / "stdout.txt").read_text() == "their log\n"
    assert (backup / "config.yml").read_text().startswith("!!python/object:argparse.Namespace")
    assert load_config(foreign / "logs" / "digits" / "config.yml").loss.lamda == 0.5
    assert train(foreign, "--resume_training", "--max_steps", "5") == 0, "and from now on it is one"
    assert len(list((foreign / "logs").glob("digits.bak-*"))) == 1
    assert generate.main(["--exp", str(foreign), "--doc", "digits", "--ckpt_id", "2", "--num_samples", "1",
                          "--timesteps", "2", "--no-fid", "--device", "cpu", "--verbose", "critical"]) == 0


def test_its_own_configuration_suffices(foreign):
    assert train_ddp.main(["--exp", str(foreign), "--doc", "digits", "--resume_training", "--max_steps", "3",
                           "--device", "cpu", "--training.sample_num", "0", "--verbose", "critical"]) == 0
    assert state(foreign)["step"] == 3


def test_a_state_of_another_network_is_one_line_and_changes_nothing(foreign, capsys):
    before = {p.name: p.read_bytes() for p in (foreign / "logs" / "digits").iterdir()}
    (foreign / "logs" / "digits" / "config.yml").unlink()
    assert train(foreign, "--resume_training", "--model.ch", "64") == 3
    error = capsys.readouterr().err
    assert "weight temb.dense.1.weight is 128x128 instead of 256x256" in error and error.count("\n") == 1
    assert {p.name for p in (foreign / "logs" / "digits").iterdir()} == before.keys() - {"config.yml"}


@pytest.mark.parametrize("change", [
    lambda content: content[:3], lambda content: [content[0], "text", *content[2:]],
    lambda content: [content[0], {"state": {"a": {}}}, *content[2:]],
    lambda content: [content[0], {"state": {}}, 0, "many", content[4]]],
    ids=["short", "no optimizer", "names", "no step"])
def test_broken_states_of_others_are_one_line(ours, tmp_path, capsys, change):
    folder = tmp_path / "logs" / "digits"
    folder.mkdir(parents=True)
    torch.save(change(as_ddim(state(ours))), folder / "ckpt.pth")
    assert train(tmp_path, "--resume_training") == 3
    error = capsys.readouterr().err
    assert "ckpt.pth" in error and error.count("\n") == 1


# -------------------------------------------------------------------------------------------------------- --init_from

def test_init_from_with_moments_goes_on_under_another_loss(ours, foreign, tmp_path_factory, caplog):
    new, stored = tmp_path_factory.mktemp("new"), state(ours)
    source = foreign / "logs" / "digits"
    flags = ["--init_from", str(source), "--keep_optimizer", "--max_steps", "1", "--lamda", "2", "--optim.lr", "1e-30"]
    with caplog.at_level(logging.INFO):
        assert train(new, *flags, level="info") == 0
    after = state(new)
    assert after["step"] == 1 and "the moments exp_avg and exp_avg_sq" in caplog.text
    assert same(after["model"], stored["model"]), "at a rate of 1e-30 the weights stay"
    assert int(after["optimizer"]["state"][0]["step"]) == 3, "of the optimizer: two of theirs and one of ours"
    for name, average in stored["ema"].items():
        torch.testing.assert_close(after["ema"][name], 0.99 * average + 0.01 * stored["model"][name])
    assert load_config(new / "logs" / "digits" / "config.yml").loss.lamda == 2


def test_power_function_averages_begin_with_the_new_run(ours, tmp_path):
    source = str(ours / "logs" / "digits" / "ckpt.pth")
    assert train(tmp_path, "--init_from", source, "--keep_optimizer", "--max_steps", "1", "--training.ema",
                 "[{length: 0.05}, {length: 0.1}]") == 0
    after = state(tmp_path)
    assert same(after["ema"], after["model"]) and same(after["more_averages"]["length 0.1"], after["model"])


def test_init_from_says_which_weights_it_took(ours, tmp_path, caplog):
    path = ours / "logs" / "digits" / "ckpt.pth"
    with caplog.at_level(logging.INFO):
        assert train(tmp_path / "a", "--init_from", str(path), "--max_steps", "1", level="info") == 0
    assert f"starting from the EMA weights of {path}, step 2" in caplog.text
    stored = state(ours)
    stored["ema"] = None
    del stored["digests"]
    torch.save(stored, tmp_path / "raw.pth")
    with caplog.at_level(logging.INFO):
        assert train(tmp_path / "b", "--init_from", str(tmp_path / "raw.pth"), "--max_steps", "1", level="info") == 0
    assert "starting from the raw weights of" in caplog.text


def test_init_from_is_refused_together_with_a_resumed_run(ours, tmp_path, capsys):
    exp = tmp_path / "exp"
    shutil.copytree(ours, exp)
    source = str(ours / "logs" / "digits" / "ckpt.pth")
    assert train(exp, "--resume_training", "--init_from", source) == 2
    error = capsys.readouterr().err
    assert "leave out --init_from" in error and error.count("\n") == 1
    assert train(tmp_path / "fresh", "--resume_training", "--init_from", source, "--max_steps", "1") == 0


@pytest.mark.parametrize(("flags", "message"), [
    (["--keep_optimizer"], "needs --init_from"),
    (["--keep_optimizer", "--init_from", "{ours}/logs"], "no full state"),
    (["--keep_optimizer", "--init_from", "{tmp}/ema.pth"], "no full training state")])
def test_moments_that_are_not_there(ours, tmp_path, capsys, flags, message):
    torch.save(state(ours)["ema"], tmp_path / "ema.pth")
    assert train(tmp_path / "exp", *[flag.format(ours=ours, tmp=tmp_path) for flag in flags]) in (2, 3)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list((tmp_path / "exp").rglob("ckpt*"))
