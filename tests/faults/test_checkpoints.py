"""Checkpoints are whole or absent, whatever ends their writer; a full disk costs no run; what retention deletes."""

import errno
import logging
import os
import random
import signal
import time

import pytest
import torch

from runners.training.checkpoint import RunFolder
from runners.training.writer import CheckpointWriter
from tests.faults import jobs
from utils.atomic import atomic_path, atomic_write, remove_leftovers
from utils.errors import SaveError


def make_state(step: int, best=None, size: int = 200_000) -> dict:
    """A full state in which every number is ``step``, so that a mixture of two would show."""
    weights = {"w": torch.full((size,), float(step))}
    return {"format_version": 1, "step": step, "epoch": step, "best_fid": best, "model": weights,
            "ema": {"w": weights["w"].clone()}, "optimizer": {"state": {0: {"exp_avg": weights["w"].clone()}}},
            "more_averages": {}, "config": {"training": {"ema": [{"rate": 0.9, "length": None}]}}}


def write_for_ever(folder: str, first: int, done) -> None:
    """Save snapshot after snapshot, and tell the parent which one is about to be written and which one is safe."""
    writer = CheckpointWriter(RunFolder(folder), keep_last=2, keep_every=None, snapshots=[])
    for step in range(first, 1_000_000):
        done.send(("started", step))
        writer.save(make_state(step), epoch=step)
        writer._wait()
        done.send(("saved", step))


def kill_a_writer(folder, first: int, seconds: float) -> tuple[int, int]:
    """SIGKILL a writer ``seconds`` after its first save. Returns the last step it saved and the last it began."""
    here, there = jobs.SERVER.Pipe(duplex=False)
    writer = jobs.SERVER.Process(target=write_for_ever, args=(str(folder), first, there))
    writer.start()
    there.close()
    last = {"saved": first - 1, "started": first - 1}
    try:
        while last["saved"] < first:
            last.update([here.recv()])
        time.sleep(seconds)                          # the point of the test: a moment that nobody chose
        os.kill(writer.pid, signal.SIGKILL)
        while True:
            last.update([here.recv()])
    except EOFError:
        writer.join()
    assert writer.exitcode == -signal.SIGKILL
    return last["saved"], last["started"]


def check_folder(run: RunFolder, saved: int, started: int) -> int:
    """The newest state is the last one saved or the one under way, and every file with a name is whole."""
    state, path = run.load_newest()
    assert path.name == "ckpt.pth" and saved <= state["step"] <= started, (saved, state["step"], started)
    for file in run.path.glob("*.pth"):
        content = torch.load(file, weights_only=True)
        step = content.get("step", int(content["w"][0]) if "w" in content else None)
        assert all((t == step).all() for t in (content.get("model") or content).values())
    return state["step"]


@pytest.mark.parametrize("writes", [1, 2])
def test_a_first_save_cut_off_after_any_file_can_be_resumed(tmp_path, monkeypatch, writes):
    """A run whose only files are from a save that did not end still has a full state."""
    done = []

    def cut_off(path, write):
        if len(done) == writes:
            raise OSError(errno.EIO, "cut off here")
        done.append(path)
        return atomic_write(path, write)

    monkeypatch.setattr("runners.training.writer.atomic_write", cut_off)
    monkeypatch.setattr("runners.training.writer.atomic_path", lambda path: cut_off(path, None))
    run, state = RunFolder(tmp_path), make_state(3, size=10)
    writer = CheckpointWriter(run, keep_last=2, keep_every=None, snapshots=[])
    writer.save(state, epoch=3)
    with pytest.raises(SaveError, match="cut off here"):
        writer.close()
    assert len(done) == writes and torch.load(run.full_states()[0])["step"] == 3


def test_ten_sigkills_while_writing(tmp_path):
    first = 1
    for _ in range(10):
        saved, started = kill_a_writer(tmp_path, first, random.uniform(0, 0.02))
        first = check_folder(RunFolder(tmp_path), saved, started) + 1
    remove_leftovers(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a_snapshot_is_whole_before_the_newest_state_is_replaced(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    with CheckpointWriter(run, keep_last=None, keep_every=None, snapshots=[]) as writer:
        writer.save(make_state(1))
        writer._wait()
        monkeypatch.setattr("shutil.copyfile", full_disk)
        writer.save(make_state(2), epoch=2)
        with pytest.raises(SaveError, match="No space left"):
            writer.close()
    assert torch.load(run.path / "ckpt.pth")["step"] == 1
    assert check_folder(run, 1, 1) == 1 and torch.load(run.path / "ckpt_2.pth")["step"] == 2
    assert run.weights(2).name == "model_2_ema.pth" and not list(tmp_path.glob(".*"))


def full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_costs_checkpoints_but_not_the_run(tmp_path):
    """From step 3 on no file may grow beyond 2 kB: neither checkpoints nor metrics, curves and log."""
    flags = ["--training.max_steps", "8", *jobs.EVERY_TWO, "--verbose", "warning"]
    full = jobs.train(tmp_path / "full", *flags, faults=jobs.full_disk(3))
    freed = jobs.train(tmp_path / "freed", *flags, faults=jobs.full_disk(3, 7))
    assert full.wait() == 3, full.text
    assert "SAVING FAILED, training goes on with the old checkpoint" in full.text
    assert "train_ddp.py: the last checkpoint could not be saved" in full.text
    assert jobs.state(tmp_path / "full")["step"] == 2
    assert not list((tmp_path / "full").rglob(".*.tmp")), "half a file is removed at once, the disk is full already"
    assert freed.wait() == 0 and "SAVING FAILED" in freed.text, freed.text
    assert jobs.state(tmp_path / "freed")["step"] == 8
    resumed = jobs.train(tmp_path / "full", *flags, "--resume_training")
    assert resumed.wait() == 0, resumed.text
    assert jobs.same(jobs.state(tmp_path / "full"), jobs.state(tmp_path / "freed"))


def test_a_failed_write_leaves_the_old_file_and_is_told_at_the_end(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    writer = CheckpointWriter(RunFolder(tmp_path), None, None, [])
    writer.save(make_state(1, size=10))
    writer._wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        writer.save(make_state(2, size=10))
        writer._wait()
    assert "SAVING FAILED" in caplog.text and RunFolder(tmp_path).load_newest()[0]["step"] == 1
    with pytest.raises(SaveError, match="No space left"):
        writer.close()


SNAPSHOTS = {"ckpt_{}.pth", "model_{}_ema.pth"}


@pytest.mark.parametrize(("keep_last", "keep_every", "best_at", "kept"), [
    (None, None, None, range(1, 10)), (1, None, None, [9]), (3, None, None, [7, 8, 9]), (2, 4, None, [4, 8, 9]),
    (1, None, 3, [3, 9]), (2, 5, 3, [3, 5, 8, 9]),
])
def test_retention(tmp_path, keep_last, keep_every, best_at, kept):
    """Nine snapshots in two jobs; the best by FID is found in epoch ``best_at``."""
    foreign = {"ckpt_20.pth", "model_2_ema.pth.bak", "ckpt_0.pth", "notes.txt", "model_99_ema.pth"}
    for name in foreign:
        (tmp_path / name).write_bytes(b"mine")
    snapshots = []
    for epochs in (range(1, 6), range(6, 10)):                 # the second job continues the list of the first
        writer = CheckpointWriter(RunFolder(tmp_path), keep_last, keep_every, snapshots)
        for epoch in epochs:
            best = {"fid": 1.0, "snapshot": best_at if best_at and epoch >= best_at else 1} if best_at else None
            writer.save(make_state(epoch, best, size=10), epoch)
        writer.close()
        snapshots = torch.load(tmp_path / "ckpt.pth", weights_only=True)["snapshots"]
    expected = {name.format(epoch) for name in SNAPSHOTS for epoch in kept} | foreign | {"ckpt.pth"}
    assert {p.name for p in tmp_path.iterdir()} == expected
    assert all((tmp_path / name).read_bytes() == b"mine" for name in foreign)
    assert torch.load(tmp_path / "ckpt.pth", weights_only=True)["step"] == 9


def test_the_newest_whole_state_is_used_and_the_broken_ones_are_named(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    run, writer = RunFolder(tmp_path), CheckpointWriter(RunFolder(tmp_path), None, None, [])
    for epoch in (1, 2, 3):
        writer.save(make_state(epoch, size=10), epoch)
    writer.close()
    (tmp_path / "ckpt.pth").write_bytes((tmp_path / "ckpt.pth").read_bytes()[:-200])
    (tmp_path / "ckpt_3.pth").write_bytes(b"")
    state, path = run.load_newest()
    assert path.name == "ckpt_2.pth" and state["step"] == 2
    assert "ckpt.pth" in caplog.text and "ckpt_3.pth" in caplog.text


def test_temporary_files_keep_the_users_umask_and_only_ours_are_removed(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "a.bin") as temporary:
            temporary.write_bytes(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.bin").stat().st_mode & 0o777 == 0o640
    (tmp_path / ".a.bin.0123abcd.tmp").touch()
    (tmp_path / ".vimrc.tmp").touch()
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"a.bin", ".vimrc.tmp"}
