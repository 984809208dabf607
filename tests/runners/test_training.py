"""The training loop: exact resume, accumulation and processes that change nothing, interruption, refusals."""

import json

import pytest
import torch

import train_ddp
from tests.conftest import TINY
from tests.faults import jobs

HARD = ["--model.dropout", "0.1", "--input_perturbation", "0.1", "--num_consecutive_steps", "2", "--lamda", "1",
        "--data.random_flip", "true", "--optim.lr", "2e-4", "--optim.lr_schedule", "cosine",
        "--optim.warmup_steps", "3", "--training.max_steps", "8"]


def train(exp, *flags):
    return train_ddp.main([*TINY, "--exp", str(exp), *flags])


def state(exp, doc="digits", name="ckpt.pth"):
    return torch.load(exp / "logs" / doc / name, weights_only=True)


def lines(exp, doc="digits"):
    found = [json.loads(line) for line in (exp / "logs" / doc / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in found]


def assert_same(a, b):
    assert a.keys() == b.keys() if isinstance(a, dict) else type(a) is type(b)
    if isinstance(a, dict):
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


REMEDIES = ["--loss.scheduled_sampling", "{steps: 2, ramp: 0.5}", "--loss.input_perturbation_probability", "0.8"]
SLOW_FLOW = ["--loss.slow_flow", "0.8", "--training.time_sampler", "beta"]


@pytest.mark.parametrize("flags", [
    [], ["--amp", "bf16", "--training.micro_batch_size", "4"], REMEDIES, SLOW_FLOW],
    ids=["fp32", "bf16-accumulation", "remedies", "slow-flow"])
def test_resume_is_exact(tmp_path, flags):
    assert train(tmp_path / "whole", *HARD, *flags) == 0
    assert train(tmp_path / "halves", *HARD, *flags, "--max_steps", "5") == 0
    assert train(tmp_path / "halves", *HARD, *flags, "--resume_training") == 0
    whole, halves = state(tmp_path / "whole"), state(tmp_path / "halves")
    assert whole["step"] == 8
    assert_same(whole, halves)
    assert lines(tmp_path / "whole") == lines(tmp_path / "halves")


def test_a_logging_interval_survives_a_resume(tmp_path):
    interval = ["--training.log_freq", "4"]
    train(tmp_path / "whole", *HARD, *interval)
    train(tmp_path / "cut", *HARD, *interval, "--max_steps", "2")
    train(tmp_path / "cut", *HARD, *interval, "--resume_training")
    assert lines(tmp_path / "whole")[-1] == lines(tmp_path / "cut")[-1]


@pytest.mark.parametrize("remedies", [[], REMEDIES], ids=["plain", "remedies"])
def test_the_number_of_processes_changes_nothing_when_the_shards_are_the_same(tmp_path, remedies):
    """One process with two network calls a step, and two processes with one call: same noise, same dropout."""
    flags = [*HARD, *remedies, "--training.global_batch_size", "8", "--training.micro_batch_size", "4", "--data.cache",
             "ram"]
    assert train(tmp_path / "one", *flags) == 0
    ranks = jobs.ranks("train_ddp", [*TINY, "--exp", str(tmp_path / "two"), *flags])
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.text for rank in ranks]
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    one, two = state(tmp_path / "one")["ema"], state(tmp_path / "two")["ema"]
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)


def test_without_perturbation_the_random_stream_is_that_of_the_plain_loss(tmp_path):
    """gamma = 0 and lamda = 0: t, noise and weights equal those of a loop written out here."""
    plain = ["--num_consecutive_steps", "0", "--lamda", "0", "--max_steps", "2", "--optim.grad_clip", "null",
             "--optim.lr_schedule", "constant", "--optim.warmup_steps", "0"]
    assert train(tmp_path, *plain, "--input_perturbation", "0") == 0
    from configs.schema import load_config
    from datasets.order import batch_indices
    from datasets.packed import open_images
    from functions.rng import seeded, shard_generator
    from functions.schedule import make_schedule
    from functions.timesteps import antithetic_times
    from models import build_model, make_codec

    config = load_config(tmp_path / "logs" / "digits" / "config.yml")
    images = open_images(config, tmp_path / "datasets")
    schedule = make_schedule(config.diffusion)
    with seeded(1024):
        model = build_model(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.optim.lr, fused=True)
    for step in range(2):
        batch = next(iter(images.batches([batch_indices(images.num_images, 8, step, 1024)])))
        generator = shard_generator(1024, step, 0)
        x0 = make_codec(config).encode(batch, generator)
        t = antithetic_times(schedule, 8, generator)
        noise = torch.randn((1, *x0.shape), generator=generator)[0]
        eps = model(schedule.add_noise(x0, noise, t), t)
        (noise - eps).square().flatten(1).sum(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    stored = state(tmp_path)["model"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored[name]), name


def test_a_run_folder_holds_what_it_should(tmp_path):
    assert train(tmp_path, "--training.n_epochs", "1", "--training.batch_size", "512", "--training.log_freq", "2") == 0
    run = tmp_path / "logs" / "digits"
    present = {p.name for p in run.iterdir()}
    assert present == {"config.yml", "ckpt.pth", "ckpt_1.pth", "model_1_ema.pth", "metrics.jsonl", "stdout.txt",
                       "samples", "tensorboard"}
    assert [p.name for p in (run / "samples").iterdir()] == ["0000003.png"]
    first = lines(tmp_path)[0]
    assert set(first) == {"step", "epoch", "loss", "loss_base", "loss_sequence", "loss_base_q1", "loss_base_q2",
                          "loss_base_q3", "loss_base_q4", "grad_norm", "lr", "skipped_steps"}
    assert first["loss"] == pytest.approx(first["loss_base"] + first["loss_sequence"])
    stored = state(tmp_path)
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in [*stored["model"], *stored["ema"]])
    average = torch.load(run / "model_1_ema.pth", weights_only=True)
    assert_same(dict(average), dict(stored["ema"]))


def test_an_existing_run_is_never_lost(tmp_path, capsys):
    assert train(tmp_path, "--max_steps", "1") == 0
    before = (tmp_path / "logs" / "digits" / "ckpt.pth").read_bytes()
    assert train(tmp_path, "--max_steps", "1") == 2
    assert "--resume_training" in capsys.readouterr().err
    assert train(tmp_path, "--max_steps", "1", "--overwrite", "--seed", "7") == 0
    backup, = (tmp_path / "logs").glob("digits.bak-*")
    assert (backup / "ckpt.pth").read_bytes() == before
    assert (tmp_path / "logs" / "digits" / "ckpt.pth").read_bytes() != before


def test_runs_of_a_study_below_a_run_of_its_name_are_left_alone(tmp_path, capsys):
    """README's quickstart trains exp/logs/digits, the study digits.yml exp/logs/digits/plain-11."""
    assert train(tmp_path, "--max_steps", "1") == 0
    run = tmp_path / "logs" / "digits"
    for path in (own := run / ".ckpt.pth.0123abcd.tmp", inner := run / "plain-11" / own.name):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (run / "plain-11" / "config.yml").touch()
    assert train(tmp_path, "--max_steps", "1", "--overwrite") == 2
    assert "holds runs of a study, such as plain-11" in capsys.readouterr().err and (run / "ckpt.pth").exists()
    assert train(tmp_path, "--max_steps", "2", "--resume_training") == 0
    assert inner.exists() and not own.exists()


def test_resuming_with_another_network_is_refused(tmp_path, capsys):
    assert train(tmp_path, "--max_steps", "1") == 0
    assert train(tmp_path, "--resume_training", "--model.ch", "64") == 2
    assert "model.ch is 32 there, 64 here" in capsys.readouterr().err


def test_a_broken_newest_checkpoint_is_passed_over(tmp_path):
    every_step = ["--training.snapshot_unit", "steps", "--training.snapshot_freq", "1"]
    assert train(tmp_path, "--max_steps", "2", *every_step) == 0
    path = tmp_path / "logs" / "digits" / "ckpt.pth"
    path.write_bytes(path.read_bytes()[:1000])
    assert train(tmp_path, "--max_steps", "3", "--resume_training") == 0
    assert state(tmp_path)["step"] == 3


def test_a_diverged_run_ends_with_4_and_saves_nothing(tmp_path, capsys):
    assert train(tmp_path, "--max_steps", "50", "--optim.lr", "1e30") == 4
    assert "max_bad_steps 20" in capsys.readouterr().err
    assert not (tmp_path / "logs" / "digits" / "ckpt.pth").exists()


def test_sigterm_reaches_all_ranks_which_save_and_exit_143(tmp_path):
    job = jobs.Job("train_ddp", [*TINY, "--exp", str(tmp_path), "--num_process_per_node", "2"])
    jobs.wait_until((tmp_path / "logs" / "digits" / "metrics.jsonl").exists)
    job.process.terminate()
    assert job.wait() == 143, job.text
    assert "--resume_training continues" in job.text
    assert state(tmp_path)["step"] >= 1
