"""A lost rank under our launcher, which starts real ranks: brought back, or the end of the job within a minute."""

import os
import signal
import time

import pytest

from tests.faults import jobs

STEPS = ["--training.max_steps", "40", "--training.snapshot_unit", "steps", "--training.snapshot_freq", "4"]
TWO = ["--num_process_per_node", "2"]


def kill_a_rank(job, exp) -> list[int]:
    """SIGKILL the second rank once there is a checkpoint. Returns all ranks."""
    jobs.wait_until(lambda: (exp / "logs" / "digits" / "ckpt.pth").exists())
    ranks = jobs.children(job.process.pid)
    assert len(ranks) == 2, ranks
    os.kill(ranks[1], signal.SIGKILL)
    return ranks


def test_a_killed_rank_is_brought_back_and_changes_nothing(tmp_path):
    """Started with --overwrite over an older run, which the second start must not take away again."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert jobs.train(broken, "--max_steps", "1").wait() == 0
    job = jobs.train(broken, *STEPS, *TWO, "--max_restarts", "1", "--overwrite", "--verbose", "info",
                     env={"OMP_NUM_THREADS": "1"})
    jobs.wait_until(lambda: list((broken / "logs").glob("digits.bak-*")))
    kill_a_rank(job, broken)
    undisturbed = jobs.train_ranks(whole, 2, *STEPS)
    assert [rank.wait() for rank in undisturbed] == [0, 0]
    assert job.wait() == 0, job.text
    assert "resumed from" in job.text and len(list((broken / "logs").glob("digits.bak-*"))) == 1
    assert jobs.same(jobs.state(whole), jobs.state(broken))
    assert jobs.metrics(whole) == jobs.metrics(broken)


def test_a_single_process_is_brought_back_too(tmp_path):
    job = jobs.train(tmp_path, *STEPS, "--max_restarts", "1", "--verbose", "info")
    jobs.wait_until(lambda: (tmp_path / "logs" / "digits" / "ckpt.pth").exists())
    rank, = jobs.children(job.process.pid)
    os.kill(rank, signal.SIGKILL)
    assert job.wait() == 0, job.text
    assert "resumed from" in job.text and jobs.state(tmp_path)["step"] == 40


def test_without_restarts_the_job_ends_soon_and_leaves_nobody(tmp_path):
    job = jobs.train(tmp_path, *STEPS, *TWO, "--training.max_steps", "100000", env={"OMP_NUM_THREADS": "1"})
    ranks = kill_a_rank(job, tmp_path)
    died = time.monotonic()
    assert job.wait(60) == 128 + signal.SIGKILL, job.text
    assert time.monotonic() - died < 60
    assert "rank 1 died (signal 9); resume with" in job.text and "Traceback" not in job.text, job.text
    assert not any(jobs.alive(pid) for pid in ranks)


@pytest.mark.parametrize("processes", [TWO, ["--max_restarts", "1"]], ids=["two", "one"])
def test_a_killed_launcher_takes_its_ranks_along_and_they_save(tmp_path, processes):
    job = jobs.train(tmp_path, *STEPS, *processes, "--training.max_steps", "100000", "--verbose", "warning",
                     env={"OMP_NUM_THREADS": "1"})
    run = tmp_path / "logs" / "digits"
    jobs.wait_until(lambda: (run / "ckpt.pth").exists())
    ranks, lines = jobs.children(job.process.pid), (run / "metrics.jsonl").read_text().count("\n")
    job.process.kill()
    assert job.wait() == -signal.SIGKILL
    jobs.wait_until(lambda: not any(jobs.alive(pid) for pid in ranks), seconds=30)
    saved = jobs.state(tmp_path)["step"]
    assert saved >= lines and saved == jobs.metrics(tmp_path)[-1]["step"], "after the step that was under way"
    assert "Traceback" not in job.text, job.text


def test_two_jobs_of_two_ranks_share_a_machine_and_a_data_set(tmp_path):
    """Default ports, nothing packed yet."""
    (tmp_path / "a").mkdir()
    pair = [jobs.train(tmp_path / "a", "--doc", doc, *TWO, "--max_steps", "2", "--verbose", "info",
                       env={"OMP_NUM_THREADS": "1"}) for doc in ("first", "second")]
    assert [job.wait() for job in pair] == [0, 0], [job.text for job in pair]
    assert sum(job.text.count("packed 1797 images") for job in pair) <= 1          # other ranks than 0 log errors only
    assert len(list((tmp_path / "a" / "datasets" / ".packed").glob("*.npy"))) == 1


def test_ranks_get_their_time_to_save(monkeypatch):
    """LaunchConfig reads it from the environment when it is made; torch 2.6 knows no such time."""
    from torch.distributed.launcher import api

    from runners import launcher

    seen = []
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")              # so that it is taken back afterwards
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    monkeypatch.setattr(api, "elastic_launch", lambda config, *words: seen.append(config) or (lambda *argv: None))
    before = signal.getsignal(signal.SIGUSR1)
    try:
        assert launcher.launch("script.py", [], processes=2) == 0
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert getattr(seen[0], "shutdown_timeout", 600) == 600
