"""Killed at any step, a run goes on as if nothing had been: weights, moments and logged losses bit for bit."""

import random
import signal
import time

import pytest

from tests.faults import jobs

STEPS = ["--training.max_steps", "8", *jobs.EVERY_TWO]


def finish(running):
    codes = [job.wait() for job in running]
    assert codes == [0] * len(running), [job.text for job in running]


FP32, ACCUMULATION = ["--amp", "off"], ["--amp", "bf16", "--training.micro_batch_size", "4"]


@pytest.mark.parametrize(("world", "flags"), [(1, ACCUMULATION), (2, FP32), (2, ACCUMULATION)],
                         ids=["bf16-accumulation-1", "fp32-2", "bf16-accumulation-2"])
def test_sigkill_at_a_random_step(tmp_path, world, flags):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = jobs.train_ranks(whole, world, *flags, *STEPS)
    step, victim = random.randrange(3, 8), random.randrange(world)
    running = jobs.train_ranks(broken, world, *flags, *STEPS, faults={victim: jobs.killed_after(step)})
    assert running[victim].wait() == -signal.SIGKILL, running[victim].text
    died = time.monotonic()
    assert all(job.wait(60) for job in running), "every rank fails"
    assert time.monotonic() - died < 60
    finish(jobs.train_ranks(broken, world, *flags, *STEPS, "--resume_training"))
    finish(undisturbed)
    where = f"rank {victim} killed after step {step}"
    assert jobs.same(jobs.state(whole), jobs.state(broken)), where
    assert jobs.metrics(whole) == jobs.metrics(broken), where
    assert not list(broken.rglob(".*.tmp")), "leftovers of the killed process are removed"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_the_second_ends_at_once(tmp_path, signum):
    whole, broken, impatient = tmp_path / "whole", tmp_path / "broken", tmp_path / "impatient"
    undisturbed = jobs.train(whole, *STEPS)
    stopped = jobs.train(broken, *STEPS, faults=jobs.signalled_after(5, signum))
    twice = jobs.train(impatient, *STEPS, faults=jobs.signalled_after(1, signum, signum))
    assert stopped.wait() == 128 + signum, stopped.text
    assert f"signal {int(signum)} after step 5; saved" in stopped.text and "Traceback" not in stopped.text
    assert jobs.state(broken)["step"] == 5
    assert twice.wait() == 128 + signum and not (impatient / "logs" / "digits" / "ckpt.pth").exists()
    finish([jobs.train(broken, *STEPS, "--resume_training"), undisturbed])
    assert jobs.same(jobs.state(whole), jobs.state(broken)) and jobs.metrics(whole) == jobs.metrics(broken)


def sheets(exp) -> list[str]:
    return sorted(path.name for path in (exp / "logs" / "digits" / "samples").glob("*.png"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_out_the_sheet_that_is_being_drawn(tmp_path, signum):
    stopped = jobs.train(tmp_path, *jobs.EVERY_TWO, "--training.max_steps", "6", "--training.sample_num", "2",
                         "--training.first_grid_minutes", "0", "--verbose", "warning",
                         faults=jobs.signalled_while_drawing(signum))
    assert stopped.wait() == 128 + signum, stopped.text
    assert "no samples/0000002.png" in stopped.text and "Traceback" not in stopped.text
    assert jobs.state(tmp_path)["step"] == 3 and not sheets(tmp_path)


def test_the_last_sheet_is_drawn_though_a_signal_comes(tmp_path):
    """All is saved by then, and nobody would draw it later."""
    done = jobs.train(tmp_path, "--training.max_steps", "2", "--training.sample_num", "2",
                      faults=jobs.signalled_while_drawing(signal.SIGTERM))
    assert done.wait() == 0 and sheets(tmp_path) == ["0000002.png"], done.text


def test_rank_0_leaves_its_sheet_while_the_other_goes_on(tmp_path):
    pair = jobs.train_ranks(tmp_path, 2, *jobs.EVERY_TWO, "--training.max_steps", "6", "--training.sample_num", "2",
                            "--training.first_grid_minutes", "0",
                            faults={0: jobs.signalled_while_drawing(signal.SIGTERM)})
    assert [job.wait() for job in pair] == [128 + signal.SIGTERM] * 2, [job.text for job in pair]
    assert not sheets(tmp_path)
    assert jobs.state(tmp_path)["step"] == 4                  # the vote of step 3 is collected during the next


def test_a_signal_leaves_out_the_fid_that_is_being_computed(tmp_path):
    stopped = jobs.train(tmp_path, "--training.batch_size", "512", "--training.n_epochs", "2", "--training.fid_freq",
                         "1", "--training.snapshot_freq", "1", "--verbose", "warning",
                         faults=jobs.signalled_while_measuring(signal.SIGTERM))
    assert stopped.wait() == 128 + signal.SIGTERM, stopped.text
    assert "no FID at step 3: a signal came" in stopped.text and "Traceback" not in stopped.text
    assert jobs.state(tmp_path)["step"] == 3 and jobs.state(tmp_path)["best_fid"] is None


def test_a_signal_to_the_whole_job_does_not_take_the_decoding_workers_away(tmp_path):
    decoding = ["--data.cache", "off", "--data.num_workers", "1", *STEPS]
    stopped = jobs.train(tmp_path, *decoding, faults=jobs.group_terminated_after(3))
    assert stopped.wait() == 128 + signal.SIGTERM, stopped.text
    assert "Traceback" not in stopped.text and jobs.state(tmp_path)["step"] == 3
    goes_on = jobs.train(tmp_path, *decoding, "--resume_training")
    assert goes_on.wait() == 0 and "Traceback" not in goes_on.text, goes_on.text


def test_checkpoint_minutes_bound_the_loss(tmp_path):
    """A limit of no time at all: ckpt.pth follows every step, without snapshots."""
    often = ["--training.max_steps", "6", "--training.checkpoint_minutes", "1e-9"]
    job = jobs.train(tmp_path, *often, faults=jobs.killed_after(5))
    assert job.wait() == -signal.SIGKILL
    assert jobs.state(tmp_path)["step"] >= 3                  # of 4 steps saved, the last may have been under way
    assert not (tmp_path / "logs" / "digits" / "ckpt_0.pth").exists()


def test_the_learning_rate_of_a_resumed_run_is_the_one_given(tmp_path):
    finish([jobs.train(tmp_path, "--max_steps", "2")])
    finish([jobs.train(tmp_path, "--max_steps", "3", "--resume_training", "--optim.lr", "3e-5")])
    finish([jobs.train(tmp_path, "--max_steps", "4", "--resume_training", "--optim.lr", "1e-3", "--optim.lr_schedule",
                       "constant")])
    assert [line["lr"] for line in jobs.metrics(tmp_path)][2:] == pytest.approx([3e-5, 1e-3], rel=1e-6)
    other = jobs.train(tmp_path, "--resume_training", "--optim.optimizer", "SGD")
    assert other.wait() == 2 and "optim.optimizer is" in other.text and "SGD" in other.text
