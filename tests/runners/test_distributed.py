"""Whose environment a process finds itself in, and that real launchers start real ranks."""

import os
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from runners import distributed, launcher
from runners.distributed import World, detect, master_address, on_rank_zero
from runners.launcher import launch
from tests.conftest import REPOSITORY, TINY
from tests.faults import jobs
from utils.errors import LostRank, UserError


@pytest.mark.parametrize(("env", "world"), [
    ({}, None),
    ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, World(3, 8, 1)),                       # torchrun, accelerate
    ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, World(5, 8, 1)),           # srun
    ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"},
     World(5, 8, 1)),
    ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, None),  # in a batch script
    ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),  # srun --pty bash
    ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_NTASKS": "4",
      "SLURM_STEP_NUM_TASKS": "1"}, None),                                                     # a shell of salloc -n 4
    ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}, World(2, 4, 2)),
    ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}, World(1, 2, 1)),                # MPICH, Intel MPI
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, World(0, 2, 0)),
])
def test_detect(env, world):
    assert detect(env) == world


@pytest.mark.parametrize(("env", "given", "address"), [
    ({}, None, "127.0.0.1"), ({"MASTER_ADDR": "a"}, None, "a"), ({"MASTER_ADDR": "a"}, "b", "b"),
    ({"SLURM_NODELIST": "node[03-07,12]"}, None, "node03"), ({"SLURM_STEP_NODELIST": "n1,n2"}, None, "n1"),
])
def test_master_address(env, given, address):
    assert master_address(env, given) == address


def test_jobs_of_a_launcher_that_gives_no_port_have_ports_of_their_own():
    jobs_of_one_allocation = [{"SLURM_JOB_ID": "7", "SLURM_STEP_ID": step, "SLURM_PROCID": "3"} for step in "01"]
    of_one_machine = [{"PMIX_NAMESPACE": f"prterun-node-{pid}@1", "OMPI_COMM_WORLD_RANK": "1"} for pid in (5, 6)]
    ports = [distributed.default_port(env) for env in [*jobs_of_one_allocation, *of_one_machine]]
    assert len({*ports}) == 4 and all(29500 <= port < 30500 for port in ports)
    assert distributed.default_port({**of_one_machine[0], "OMPI_COMM_WORLD_RANK": "0"}) == ports[2]
    assert distributed.default_port({}) == 29500


def count_messages(rank: int, port: int) -> int:
    """How many messages of rank 0 there are while it works alone for a moment."""
    distributed.BEAT, broadcast, seen = 0.05, distributed._broadcast, []
    distributed._broadcast = lambda value: seen.append(broadcast(value)) or seen[-1]
    with distributed.process_group(World(rank, 2, rank), torch.device("cpu"), port=port):
        assert on_rank_zero(lambda: time.sleep(1) or "done") == "done"
    return len(seen)


def test_who_waits_for_rank_zero_hears_that_it_works():
    """A group's timeout is for one message, so that what rank 0 does alone may take longer."""
    port = jobs.free_port()
    counts = [job.wait() for job in [jobs.Job(count_messages, [rank, port]) for rank in range(2)]]
    assert counts[0] == counts[1] > 3


def test_on_rank_zero_returns_and_raises():

    assert on_rank_zero(lambda: 5) == 5
    with pytest.raises(UserError, match="no") as caught:
        on_rank_zero(lambda: (_ for _ in ()).throw(UserError("no")))
    assert caught.value.on_all_ranks


def test_of_a_lost_rank_the_first_sentence_is_told():
    error = RuntimeError("[/a/gloo/pair.cc:561] Connection closed by peer [127.0.0.1]:3734. This is typically "
                         "caused by a remote worker crashing. Check the logs.\nException raised from ...")
    assert distributed.first_sentence(error) == "Connection closed by peer [127.0.0.1]:3734"


LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                   "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port",
                   str(30000 + os.getpid() % 20000)],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_foreign_launchers(tmp_path, launcher):
    command = [*LAUNCHERS[launcher], "train_ddp.py", *TINY, "--exp", str(tmp_path), "--max_steps", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=jobs.PATIENCE)
    assert done.returncode == 0, done.stderr
    stored = torch.load(tmp_path / "logs" / "digits" / "ckpt.pth", weights_only=True)
    assert len(stored["metric_sums"]) == 2                                # one entry for each rank


@pytest.mark.parametrize("names", [("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
                                   ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")],
                         ids=["srun", "mpirun"])
def test_ranks_by_their_variables(tmp_path, names):
    """What srun and mpirun do: start the same command with a number in its environment."""
    argv = [*TINY, "--exp", str(tmp_path), "--max_steps", "1", "--master_port", str(jobs.free_port())]
    ranks = [jobs.Job("train_ddp", argv, env=dict(zip(names, (str(rank), "2", str(rank)), strict=True)))
             for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.text for rank in ranks]
    assert len(torch.load(tmp_path / "logs" / "digits" / "ckpt.pth", weights_only=True)["metric_sums"]) == 2


def test_our_launcher_returns_the_code_of_the_rank_that_failed(tmp_path):
    """A data set whose files vanish between the check and the ranks: every rank exits 3, and so does the launcher."""
    (tmp_path / "rank.py").write_text("import os, sys; sys.exit(3 if os.environ['RANK'] == '1' else 0)")
    assert jobs.Job(partial(launch, processes=2), [str(tmp_path / "rank.py"), []]).wait() == 3


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert distributed.pick_device("auto", World(0, 2, 0)).type == "cuda"
    with pytest.raises(UserError, match=r"2 processes on a node with 1 GPU"):
        distributed.pick_device("cuda", World(1, 2, 1))
    for given in ("1", "a100:1"):                                       # each task of Slurm's sees its own only
        monkeypatch.setenv("SLURM_GPUS_PER_TASK", given)
        assert distributed.pick_device("cuda", World(1, 2, 1)) == torch.device("cuda", 0)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "a100:11")
    with pytest.raises(UserError):
        distributed.pick_device("cuda", World(1, 2, 1))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")                     # a line under mpirun, or srun --gpu-bind
    assert distributed.pick_device("cuda", World(1, 2, 1)) == torch.device("cuda", 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")                      # torchrun's ranks share what is visible
    with pytest.raises(UserError):
        distributed.pick_device("cuda", World(1, 2, 1))


def test_all_ranks_that_were_killed_are_named():
    """Where one is killed the agent kills those that do not end in time; which was the first cannot be told."""
    for killed, who in (([1], "rank 1 died"), ([0, 1], "ranks 0, 1 died")):
        with pytest.raises(LostRank, match=who) as lost:
            launcher._told({rank: SimpleNamespace(exitcode=-9, timestamp=5) for rank in killed})
        assert lost.value.code == 137
