"""What a run shows: curves that survive a resume, time that counts training only, sheets of pictures, the log."""

import json
import logging
import time

import numpy as np
import pytest
import torch
from PIL import Image

import train_ddp
from runners.training.monitor import Monitor
from runners.training.plan import Plan
from tests.conftest import TINY
from utils.captions import HEIGHT
from utils.errors import DivergedError
from utils.png import GAP


def train(exp, *flags, level="critical"):
    return train_ddp.main([*TINY, "--exp", str(exp), *flags, "--verbose", level])


def metrics(exp):
    return [json.loads(line) for line in (exp / "logs" / "digits" / "metrics.jsonl").read_text().splitlines()]


def curve(exp, tag="loss") -> list[int]:
    """Steps that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(exp / "logs" / "digits" / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    events = board.Scalars(tag) if tag in board.Tags()["scalars"] else board.Images(tag)
    return [event.step for event in events]


def test_tensorboard_keeps_the_step_that_is_gone_on_from(tmp_path):
    assert train(tmp_path, "--max_steps", "3") == 0
    assert train(tmp_path, "--max_steps", "5", "--resume_training") == 0
    assert curve(tmp_path) == [1, 2, 3, 4, 5]
    assert curve(tmp_path, "samples") == [3, 5]


@pytest.mark.parametrize("code", [0, 4])
def test_curves_are_closed_however_a_run_ends(tmp_path, monkeypatch, code):
    """A run of Weights & Biases that is not would go on for ever."""
    from runners.training.loggers import LOGGERS, TensorBoard
    from runners.training.state import TrainingState

    closed = []

    class Recorder(TensorBoard):
        def close(self):
            super().close()
            closed.append(self)

    def diverge(self, step):
        raise DivergedError("it did")

    monkeypatch.setitem(LOGGERS, "tensorboard", Recorder)
    if code:
        monkeypatch.setattr(TrainingState, "check_divergence", diverge)
    assert train(tmp_path, "--max_steps", "1") == code
    assert len(closed) == 1 and curve(tmp_path) == [1]


def test_a_sheet_whose_chain_diverges_is_left_out(tmp_path, monkeypatch, caplog):
    def diverge(*args):
        raise DivergedError("the chain gave numbers that are not finite")

    monkeypatch.setattr("runners.training.session.training_sheet", diverge)
    assert train(tmp_path, "--max_steps", "2", level="warning") == 0
    assert "no samples/0000002.png: the chain gave numbers" in caplog.text
    assert (tmp_path / "logs" / "digits" / "ckpt.pth").exists()


def test_a_finished_run_is_left_alone(tmp_path, caplog):
    assert train(tmp_path, "--training.max_steps", "2") == 0
    run = tmp_path / "logs" / "digits"
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in ("stdout.txt", "config.yml")}
    with caplog.at_level(logging.INFO):
        assert train(tmp_path, "--training.max_steps", "2", "--resume_training", level="info") == 0
    assert "already finished: step 2 of 2; to go on give more training.n_epochs or training.max_steps" in caplog.text
    assert {p: p.read_bytes() for p in before} == before
    assert curve(tmp_path) == [1, 2] and curve(tmp_path, "samples") == [2]


@pytest.mark.parametrize(("flags", "text"), [
    (["--max_steps", "1", "--training.max_steps", "2"], "this call ends at step 1; the run and its learning rate"),
    (["--max_steps", "9", "--training.max_steps", "2"], "--max_steps 9 is beyond the run, which training.max_steps"),
    (["--max_steps", "9", "--training.n_epochs", "1", "--training.batch_size", "1000"], "training.n_epochs 1 ends")])
def test_which_limit_wins_is_said(tmp_path, caplog, flags, text):
    with caplog.at_level(logging.INFO):
        assert train(tmp_path, *flags, level="info") == 0
    assert caplog.text.count(text) == 1


def test_no_line_comes_twice(tmp_path, caplog):
    assert train(tmp_path, "--max_steps", "1") == 0
    with caplog.at_level(logging.INFO):
        assert train(tmp_path, "--max_steps", "2", "--resume_training", "--optim.lr", "1e-4", level="info") == 0
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)), said
    assert any("resuming with another setting: optim.lr" in line for line in said)


def test_the_log_of_a_run_has_one_line_for_each_message(tmp_path):
    from runners.training.checkpoint import RunFolder
    from runners.training.monitor import log_to_file

    with log_to_file(RunFolder(tmp_path)):
        logging.getLogger("any").warning("a name with\na line and \x1b[31mcolour")
    text = (tmp_path / "stdout.txt").read_text()
    assert text.count("\n") == 1 and "\x1b" not in text and r"\x1b[31mcolour" in text


def test_a_comment_or_a_file_name_cannot_forge_a_line(tmp_path, capsys):
    forged = "mine\n12:00:00 step 7/7  epoch 1  loss 0.001"
    assert train(tmp_path, "--max_steps", "1", "--comment", forged, level="info") == 0
    told = capsys.readouterr().err, (tmp_path / "logs" / "digits" / "stdout.txt").read_text()
    for text in told:
        assert text.count(r"comment: mine\n12:00:00 step 7/7") == 1
        assert not any(line.startswith("12:00:00 step 7/7") for line in text.splitlines())
    assert train(tmp_path, "--config", "no\nsuch\x1b[2J.yml") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "\x1b" not in error


@pytest.mark.parametrize("line", ['{"step": "7", "loss": 1}', '{"step": null}', '{"step": 1, "loss": "low"}',
                                  "[" * 10**5, '{"step": 1, "loss_base": [1]}', '{"step": 1' + "0" * 400 + "}", "3",
                                  '{"step"'])
def test_odd_lines_of_metrics_are_passed_over(tmp_path, line):
    from runners.training.monitor import keep_lines_before

    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n')
    assert keep_lines_before(tmp_path / "metrics.jsonl", 5) == [{"step": 1, "loss": 2.0}]


def test_metrics_that_never_end_are_refused(tmp_path, capsys):
    """In a stranger's run folder."""
    assert train(tmp_path, "--max_steps", "1") == 0
    metrics = tmp_path / "logs" / "digits" / "metrics.jsonl"
    metrics.unlink()
    metrics.symlink_to("/dev/zero")
    capsys.readouterr()
    assert train(tmp_path, "--max_steps", "2", "--resume_training") == 3
    error = capsys.readouterr().err
    assert "metrics.jsonl: is not a file but a device" in error and error.count("\n") == 1


def test_a_new_folder_for_the_log_of_results_is_said(tmp_path, caplog):
    from runners.evaluation.logs import append_log

    with caplog.at_level(logging.INFO):
        for _ in range(2):
            append_log(tmp_path / "new" / "fid.txt", "run/ckpt.pth", {"fid": 1.0}, {})
    assert caplog.text.count(f"making the folder {tmp_path / 'new'} for fid.txt") == 1


# ---------------------------------------------------------------------------------------------------------------- time

@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def monitor(tmp_path, first_step=0, sums=None):
    from runners.training.checkpoint import RunFolder

    plan = Plan(num_images=100, world_size=1, rank=0, micro_batch=10, accumulate=1, total_steps=50, last_step=50,
                seed=0)
    return Monitor(RunFolder(tmp_path), plan, torch.device("cpu"), first_step, sums, loggers=())


def test_speed_counts_the_steps_of_this_call_and_not_pictures(tmp_path, clock):
    first = monitor(tmp_path)
    for _ in range(3):
        first.step_done(torch.tensor(1.0), torch.tensor(False))
        clock[0] += 1
    stored = first.state()
    first.close()
    resumed = monitor(tmp_path, 3, stored)
    resumed.step_done(torch.tensor(1.0), torch.tensor(False))
    clock[0] += 2
    with resumed.paused():
        clock[0] += 1000
    resumed.step_done(torch.tensor(1.0), torch.tensor(False))
    clock[0] += 2
    line = resumed.publish(5, 1e-4)
    resumed.close()
    assert line["images_per_s"] == pytest.approx(2 * 10 / 4), "two steps in four seconds, not five, not a thousand"
    assert line["grad_norm"] == 1 and line["lr"] == 1e-4, "means are of the whole interval"


def test_pictures_and_validation_are_made_while_the_clock_stands(tmp_path, monkeypatch):
    """Each takes a thousand seconds of a clock in which nothing else takes any time but one second a step."""
    from runners.training import session
    from runners.training.state import TrainingState

    now, update = [0.0], TrainingState.update
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def later(seconds, result=None):
        now[0] += seconds
        return result

    monkeypatch.setattr(TrainingState, "update", lambda self: later(1, update(self)))
    monkeypatch.setattr(session, "training_sheet", lambda *_: later(1000, torch.zeros(1, 4, 4, dtype=torch.uint8)))
    monkeypatch.setattr(session.Session, "_held_out_loss", lambda self: later(1000, 1.0))
    assert train(tmp_path, "--max_steps", "4", "--training.snapshot_unit", "steps", "--training.snapshot_freq", "1",
                 "--training.validation_freq", "1", "--data.validation_fraction", "0.1") == 0
    assert [line["images_per_s"] for line in metrics(tmp_path) if "images_per_s" in line] == pytest.approx([8] * 4)


def test_the_rate_of_a_line_is_that_of_its_step(tmp_path):
    flags = ["--optim.lr", "1e-3", "--optim.lr_schedule", "constant", "--optim.warmup_steps", "4"]
    assert train(tmp_path, *flags, "--max_steps", "5") == 0
    assert [line["lr"] for line in metrics(tmp_path)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])


# ------------------------------------------------------------------------------------------------------------ pictures

def sheet(exp) -> np.ndarray:
    path, = (exp / "logs" / "digits" / "samples").iterdir()
    return np.array(Image.open(path))


def test_a_sheet_has_real_images_and_both_etas(tmp_path, monkeypatch):
    """Pictures whose value tells what they are: real 10, EMA 50 or 60, raw 90 or 100, by eta."""
    from runners.diffusion import Batch, Diffusion

    asked = []

    def sample(self, seeds, timesteps, eta):
        value = (50 if self.averages else 90) + 10 * eta
        asked.append((bool(self.averages), eta, list(seeds)))
        yield Batch(list(seeds), torch.full((len(seeds), 1, 8, 8), value / 255))

    monkeypatch.setattr(Diffusion, "sample", sample)
    assert train(tmp_path, "--max_steps", "1", "--training.sample_num", "4") == 0
    assert asked == [(True, 0.0, [0, 1, 2, 3]), (True, 1.0, [0, 1, 2, 3]), (False, 0.0, [0, 1, 2, 3]),
                     (False, 1.0, [0, 1, 2, 3])]
    picture = sheet(tmp_path)
    assert picture.shape[1] > 1280, "each half is 640 pixels wide"
    side = (picture.shape[0] - 3 * HEIGHT - 2 * GAP) // 5                           # of an image: rows of 1, 2 and 2
    for row, values in ((HEIGHT + side, (50, 60)), (2 * (HEIGHT + side) + side + GAP, (90, 100))):
        for column, value in zip((0, picture.shape[1] // 2 + 2 * GAP), values, strict=True):
            panel = picture[row + HEIGHT:row + HEIGHT + side, column:column + side]
            assert (panel == value).all(), (row, column, np.unique(panel))
    assert len(np.unique(picture[HEIGHT:HEIGHT + side])) > 10, "real images on top"


def test_the_first_sheet_comes_after_the_first_minutes(tmp_path, capsys):
    flags = ["--training.max_steps", "4", "--training.first_grid_minutes", "1e-9"]
    assert train(tmp_path, *flags, level="info") == 0 and capsys.readouterr().err.count("drawing samples/000000") == 2
    names = sorted(path.name for path in (tmp_path / "logs" / "digits" / "samples").iterdir())
    assert names == ["0000001.png", "0000004.png"]


def test_pictures_change_nothing_that_is_trained(tmp_path):
    hard = ["--model.dropout", "0.2", "--max_steps", "3"]
    assert train(tmp_path / "a", *hard, "--training.first_grid_minutes", "1e-9") == 0
    assert train(tmp_path / "b", *hard, "--training.sample_num", "0") == 0
    a, b = (torch.load(tmp_path / x / "logs" / "digits" / "ckpt.pth", weights_only=True) for x in "ab")
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


# ------------------------------------------------------------------------------------------------------------- loggers

def test_loggers_are_chosen(tmp_path, capsys):
    assert train(tmp_path / "none", "--max_steps", "1", "--training.loggers", "[]") == 0
    assert not (tmp_path / "none" / "logs" / "digits" / "tensorboard").exists()
    assert train(tmp_path / "x", "--training.loggers", "[comet]") == 2
    assert "tensorboard" in capsys.readouterr().err


def test_wandb_that_is_not_installed_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert train(tmp_path, "--training.loggers", "[tensorboard, wandb]") == 2
    error = capsys.readouterr().err
    assert "wandb is not installed; pip install wandb" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_wandb_gets_curves_and_sheets(tmp_path, monkeypatch):
    """Its interface, by a stand-in: init, log by step, Image, finish."""
    import sys
    from types import SimpleNamespace

    logged, calls = [], []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, sorted(values))),
                          finish=lambda: calls.append("finish"))
    fake = SimpleNamespace(init=lambda **settings: calls.append(settings) or run, Image=lambda array: array.shape,
                           __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert train(tmp_path, "--max_steps", "2", "--training.loggers", "[wandb]") == 0
    assert calls[0]["name"] == "digits" and calls[0]["resume"] == "allow" and calls[-1] == "finish"
    assert calls[0]["config"]["model"]["ch"] == 32
    assert (1, ["loss"]) in logged and (2, ["loss"]) in logged and (2, ["samples"]) in logged
    for steps, flag in (("3", "--resume_training"), ("1", "--overwrite")):
        assert train(tmp_path, "--max_steps", steps, "--training.loggers", "[wandb]", flag) == 0
    first, resumed, anew = (call["id"] for call in calls if call != "finish")
    assert first == resumed != anew                           # where steps are 1 again, wandb would drop them
