"""What a resumed run accepts: whole states of its own network, optimizer and images; everything else in one line."""

import copy
import logging
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import train_ddp
from runners.diffusion import Diffusion
from runners.training.state import stored_average
from tests.conftest import TINY

TWO_AVERAGES = "[{rate: 0.9}, {half_life: 100}]"


def train(exp, *flags, level="critical"):
    return train_ddp.main([*TINY, "--exp", str(exp), *flags, "--verbose", level])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step with two averages."""
    exp = tmp_path_factory.mktemp("exp")
    assert train(exp, "--max_steps", "1", "--training.ema", TWO_AVERAGES) == 0
    return exp


@pytest.fixture
def broken(run, tmp_path):
    """``broken(change)``: a copy of that run whose state ``change`` has altered."""
    def make(change):
        exp = tmp_path / "exp"
        shutil.copytree(run, exp)
        path = exp / "logs" / "digits" / "ckpt.pth"
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)
        for other in path.parent.glob("ckpt_*.pth"):
            other.unlink()
        return exp
    return make


def put(key, value):
    def change(state):
        *way, last = key.split("/")
        for part in way:
            state = state[int(part) if part.isdigit() else part]
        last = int(last) if last.isdigit() else last
        if value is Ellipsis:
            del state[last]
        else:
            state[last] = value(state[last]) if callable(value) else value
    return change


def half_nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[0] = math.nan
    return tensor


def average(state):
    return "/".join(["more_averages", *state["more_averages"]])


BROKEN = [                                                     # key, what it becomes, what the message says
    ("optimizer/state/3/exp_avg", lambda t: t.new_zeros(2), "exp_avg of"),
    ("optimizer/state/3/exp_avg_sq", lambda t: t.double(), "torch.float64 instead of torch.float32"),
    ("optimizer/state/3/exp_avg", half_nan, "is not finite"),
    ("optimizer/state/3/exp_avg", lambda t: t.to("meta"), "_rebuild_meta_tensor"),
    ("optimizer/state/3/exp_avg", lambda t: t.to_sparse(), "holds no numbers"),
    ("optimizer/state/3/exp_avg", ..., "exp_avg of"),
    ("optimizer/state/3", ..., "is missing"),
    ("optimizer/state/999", {}, "belongs to no weight"),
    ("optimizer/state/3/exp_more", lambda: 0, "is no moment of this"),
    ("optimizer/state/3/step", 7, "step of"),
    ("optimizer/state/3/step", lambda t: t.long(), "torch.int64 instead of torch.float32"),
    ("optimizer/state/3/step", lambda t: t - 9, "is negative"),
    ("optimizer/state", [], "optimizer is a dict"),
    ("optimizer", ..., "optimizer is a NoneType"),
    ("model/conv_in.weight", lambda t: t[:1], "weight conv_in.weight is 1x1x3x3 instead of 32x1x3x3"),
    ("model/conv_in.weight", ..., "weight conv_in.weight is missing"),
    ("model/another", torch.zeros(2), "another' is not of this network"),
    ("model/conv_in.weight", "text", "not a tensor"),
    ("model", None, "it has no weights"),
    ("ema/conv_in.bias", half_nan, "averaged weight conv_in.bias is not finite"),
    ("ema/conv_in.bias", lambda t: t.bfloat16(), "torch.bfloat16"),
    ("more_averages/half_life 100/conv_in.bias", lambda t: t[:1], "conv_in.bias is 1 instead of 32"),
    ("more_averages", [], "more_averages is a list"),
    ("step", "1", "step is str"), ("step", -1, "step is int -1"), ("epoch", ..., "epoch is missing"),
    ("lr_schedule", {}, "lr_schedule is a dict"), ("lr_schedule", ..., "lr_schedule is missing"),
    ("lr_schedule/last_epoch", 1.5, "lr_schedule is a dict"),
    ("grad_scaler", {"scale": "x"}, "grad_scaler is a dict"), ("grad_scaler", ..., "grad_scaler is missing"),
    ("bad_run", "0", "bad_run is str"), ("metric_sums", [["a"]], "metric_sums is a list"),
    ("best_fid", 3.0, "best_fid is float"), ("snapshots", 3, "snapshots is int"), ("config", [], "config is a list"),
    ("ema_updates", True, "ema_updates is"), ("global_batch", 8.0, "global_batch is"),
    ("amp", "fp8", "amp is str 'fp8'"), ("digests", [], "digests is a list"),
    ("times", [1], "times is a list"),
    ("model/conv_in.bias", lambda t: t + 1, "model weights have another digest"),
    ("ema/conv_in.bias", lambda t: t + 1, "ema weights have another digest"),
    ("ema", ..., "ema weights have another digest"),
]


@pytest.mark.parametrize(("key", "value", "message"), BROKEN, ids=[f"{i}-{row[0]}" for i, row in enumerate(BROKEN)])
def test_a_state_that_does_not_fit_is_one_line_before_anything_is_loaded(broken, capsys, monkeypatch, key, value,
                                                                         message):
    from runners.training.state import TrainingState

    if value is not None and key.endswith("exp_more"):
        value = torch.zeros(1)
    exp = broken(put(key, value))
    before = (exp / "logs" / "digits" / "config.yml").read_bytes()
    monkeypatch.setattr(TrainingState, "load_state_dict", lambda *_: pytest.fail("it was loaded"))
    flags = ["--training.ema", TWO_AVERAGES, "--optim.lr", "1e-5"]
    assert train(exp, "--resume_training", "--max_steps", "2", *flags) == 3
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert (exp / "logs" / "digits" / "config.yml").read_bytes() == before


def test_only_the_position_in_the_schedule_is_read(broken):
    more = {"optimizer": 3, "lr_lambdas": [3], "_last_lr": ["x"]}
    exp = broken(put("lr_schedule", lambda stored: stored | more))
    assert train(exp, "--resume_training", "--max_steps", "2", "--training.ema", TWO_AVERAGES) == 0


@pytest.mark.parametrize(("optimizer", "extra"), [
    ("Adam", []), ("AdamW", ["--optim.amsgrad", "true"]), ("RMSProp", []), ("SGD", []),
    ("SGD", ["--optim.beta1", "0"])])
def test_every_optimizer_is_resumed(tmp_path, optimizer, extra):
    flags = ["--optim.optimizer", optimizer, *extra, "--optim.lr", "1e-6"]
    assert train(tmp_path, *flags, "--max_steps", "1") == 0
    assert train(tmp_path, *flags, "--max_steps", "2", "--resume_training") == 0


@pytest.mark.parametrize(("key", "value", "message"), [
    ("times/losses", lambda t: t[:5], "entry of times losses is 5x"),
    ("times/counts", lambda t: t - 1, "counts is not in"), ("times/counts", lambda t: t + 99, "counts is not in"),
    ("times/losses", half_nan, "entry of times losses is not finite")])
def test_the_history_of_losses_is_judged_too(tmp_path, capsys, key, value, message):
    learns = ["--training.time_sampler", "loss_second_moment"]
    assert train(tmp_path, *learns, "--max_steps", "1") == 0
    path = tmp_path / "logs" / "digits" / "ckpt.pth"
    state = torch.load(path, weights_only=True)
    put(key, value)(state)
    torch.save(state, path)
    assert train(tmp_path, *learns, "--max_steps", "2", "--resume_training") == 3
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


# ------------------------------------------------------------------------------------------------------- other images

def make_photos(folder, seed, count=16):
    folder.mkdir(parents=True)
    for i, pixels in enumerate(np.random.RandomState(seed).randint(0, 256, (count, 8, 8), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return ["--data.dataset", "FOLDER", "--data.root", str(folder)]


def test_other_images_are_refused_unless_forced(tmp_path, capsys, caplog):
    mine, others = (make_photos(tmp_path / name, seed) for name, seed in (("mine", 0), ("others", 1)))
    exp = tmp_path / "exp"
    assert train(exp, *mine, "--max_steps", "1") == 0
    resume = ["--resume_training", "--max_steps", "2"]
    assert train(exp, *others, *resume) == 2
    error = capsys.readouterr().err
    assert "other images" in error and "--force" in error and error.count("\n") == 1
    with caplog.at_level(logging.WARNING):
        assert train(exp, *others, *resume, "--force", level="warning") == 0
    assert "because of --force" in caplog.text


def test_other_images_are_refused_whatever_a_state_says_of_its_configuration(tmp_path, capsys):
    mine, others = (make_photos(tmp_path / name, seed) for name, seed in (("mine", 0), ("others", 1)))
    exp = tmp_path / "exp"
    assert train(exp, *mine, "--max_steps", "1") == 0
    for path in (exp / "logs" / "digits").glob("ckpt*.pth"):
        torch.save(torch.load(path, weights_only=True) | {"config": None}, path)
    assert train(exp, *others, "--resume_training", "--max_steps", "2") == 2
    assert "other images" in capsys.readouterr().err


def test_the_same_images_elsewhere_are_no_others(tmp_path, caplog):
    """A requeued job whose scratch disk has another name, with files that have another date."""
    mine = make_photos(tmp_path / "node1", 0)
    assert train(tmp_path / "exp", *mine, "--max_steps", "1") == 0
    moved = make_photos(tmp_path / "node2", 0)
    assert train(tmp_path / "exp", *moved, "--max_steps", "2", "--resume_training") == 0


def test_what_may_change_is_named_in_a_warning(tmp_path, caplog):
    mine = make_photos(tmp_path / "mine", 0)
    assert train(tmp_path / "exp", *mine, "--max_steps", "1") == 0
    other = ["--model.dropout", "0.3", "--training.ema", "[0.5]", "--data.random_flip", "true",
             "--data.validation_fraction", "0.25", "--training.batch_size", "4"]
    with caplog.at_level(logging.WARNING):
        assert train(tmp_path / "exp", *mine, *other, "--max_steps", "2", "--resume_training", level="warning") == 0
    for text in ("model.dropout is 0.0 there, 0.3 here", "training.ema is [rate 0.99] there, [rate 0.5] here",
                 "data.random_flip is False there, True here", "data.validation_fraction is 0.0 there, 0.25 here",
                 "resuming with another global batch: 8 images there, 4 here"):
        assert text in caplog.text


# ------------------------------------------------------------------------------------------------------------ digests

def test_weights_carry_a_digest_that_is_checked(run, tmp_path):
    """A change that the archive's own checksums do not see: the file was written anew."""
    from configs.schema import load_config
    from utils.errors import DataError

    folder = run / "logs" / "digits"
    diffusion = Diffusion(load_config(folder / "config.yml"), "cpu")
    for name, key in (("ckpt.pth", "ema"), ("model_0_ema.pth", None)):
        source = folder / name
        if key is None:
            from models.weights import weights_fingerprint, with_digest
            plain = copy.copy(dict(torch.load(folder / "ckpt.pth", weights_only=True)["ema"]))
            source = tmp_path / "whole" / name
            source.parent.mkdir()
            torch.save(with_digest(plain, weights_fingerprint(plain)), source)
        diffusion.load(source)
        content = torch.load(source, weights_only=True)
        weights = content[key] if key else content
        weights["conv_in.bias"][0] += 1
        torch.save(content, tmp_path / name)
        with pytest.raises(DataError, match="another digest"):
            diffusion.load(tmp_path / name)


def test_the_averages_file_of_a_run_has_one(tmp_path):
    every_step = ["--training.snapshot_unit", "steps", "--training.snapshot_freq", "1"]
    assert train(tmp_path, "--max_steps", "1", *every_step) == 0
    content = torch.load(tmp_path / "logs" / "digits" / "model_1_ema.pth", weights_only=True)
    assert len(content._metadata[""]["digest"]) == 16
    assert all(isinstance(value, torch.Tensor) for value in content.values())


@pytest.mark.parametrize("wanted, found", [
    ("rate 0.9, half_life 50, length 0.05", ["first", "second", "third"]),
    ("length 0.05, rate 0.9", ["third", "first"]), ("half_life 50", ["second"]),
    ("rate 0.8, length 0.05", ["first", "third"]), ("rate 0.8, rate 0.9", [None, "first"]),
    ("length 0.1, rate 0.8", ["first", None]),
])
def test_an_average_is_found_by_what_it_is(wanted, found):
    """Wherever it stands in the list. The first takes the state's first, unless another one is that."""
    stored = {"averages": ["rate 0.9", "half_life 50", "length 0.05"], "ema": "first",
              "more_averages": {"half_life 50": "second", "length 0.05": "third"}}
    names = wanted.split(", ")
    assert [stored_average(stored, index, names) for index in range(len(names))] == found


def test_in_an_older_file_the_first_average_is_the_first():
    assert stored_average({"ema": "first"}, 0, ["rate 0.8"]) == "first"
    assert stored_average({"ema": "first", "more_averages": {"rate 0.9": 2}}, 1, ["rate 0.8", "rate 0.9"]) == 2
