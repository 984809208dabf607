"""Processes: who am I in a launcher's environment, how ranks meet, and the few collectives we need.

Without a launcher every function works for a world of one, without a process group.
"""

import logging
import os
import re
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from utils.errors import DataError, LostRank, UserError
from utils.processes import signal_when_orphaned

log = logging.getLogger(__name__)
DEFAULT_PORT = 29500
BEAT = 10                                            # seconds between two signs of life of a rank that works alone
WORKING = "working"
LAUNCHER = "SA_DDIM_LAUNCHER"                        # in a rank's environment: the process that started it

# Variables of (global rank, world size, rank on this node), by launcher, in the order in which they are tried.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),                        # accelerate launch sets the same
    "mpirun (Open MPI)": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),               # before MPICH, whose names it sets too
    "mpirun (MPICH)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}


@dataclass(frozen=True)
class World:
    """Place of this process: 0 <= rank < size, 0 <= local_rank < processes on this node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def detect(env: Mapping[str, str] = os.environ) -> World | None:
    """The world that a launcher put into ``env``; None when there is no launcher.

    A batch script run by sbatch itself (no srun step) also carries SLURM_PROCID, and so does a shell that srun has
    started on its own; neither is a rank.
    """
    for name, (rank, size, local_rank) in LAUNCHERS.items():
        if name == "srun" and _is_a_single_process(env):
            continue
        if rank in env and size in env:
            return World(int(env[rank]), int(env[size]), int(env.get(local_rank, 0)))
    return None


def _is_a_single_process(env: Mapping[str, str]) -> bool:
    """Of Slurm's: SLURM_NTASKS of an interactive step may be that of the whole allocation."""
    tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS"))
    return tasks == "1" or ("SLURM_JOB_ID" in env and "SLURM_STEP_ID" not in env)


def default_port(env: Mapping[str, str]) -> int:
    """The same on all ranks of a job that srun or Open MPI has started, and hardly that of another job beside it."""
    job = env.get("PMIX_NAMESPACE") or " ".join(env[key] for key in ("SLURM_JOB_ID", "SLURM_STEP_ID") if key in env)
    return DEFAULT_PORT + zlib.crc32(job.encode()) % 1000


def master_address(env: Mapping[str, str], given: str | None) -> str:
    """Flag, then MASTER_ADDR, then the first host of the Slurm node list, then this machine."""
    nodes = re.match(r"([^\[,]+)(?:\[(\d+))?", env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "")))
    first_node = (nodes[1] + (nodes[2] or "")) if nodes else None
    return given or env.get("MASTER_ADDR") or first_node or "127.0.0.1"


def restarted() -> bool:
    """True in a rank that torchrun started again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def launched() -> bool:
    """True in a rank that our own ``launch`` has started."""
    return LAUNCHER in os.environ


def follow_launcher() -> None:
    """In a rank of our own launcher: save and end, as after SIGTERM, should the launcher be killed."""
    if launched():
        signal_when_orphaned(int(os.environ[LAUNCHER]), signal.SIGTERM)


def pick_device(name: str, world: World) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` for this rank.

    Raises:
        UserError: CUDA asked for but absent, or more processes on this node than GPUs.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda was given, but this machine has no usable CUDA GPU; use --device cpu or auto")
    if torch.cuda.device_count() == 1 and _sees_its_own_gpu(os.environ):
        return torch.device("cuda", 0)
    check_gpus(world.local_rank + 1)
    return torch.device("cuda", world.local_rank)


def _sees_its_own_gpu(env: Mapping[str, str]) -> bool:
    """Whether srun, or a line under mpirun, shows this rank one GPU alone. All ranks of torchrun see the same ones."""
    of_a_task, visible = env.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2], env.get("CUDA_VISIBLE_DEVICES")
    return of_a_task == "1" or bool(visible) and "," not in visible and "TORCHELASTIC_RUN_ID" not in env


def check_gpus(processes: int) -> None:
    if processes > torch.cuda.device_count():
        raise UserError(f"{processes} processes on a node with {torch.cuda.device_count()} GPU(s); "
                        "lower --num_process_per_node, or use --device cpu")


@contextmanager
def process_group(world: World | None, device: torch.device, address: str | None = None, port: int | None = None,
                  timeout_minutes: float = 30):
    """Join the other ranks for a ``with`` block, after which a rank must ``leave``; nothing without a launcher."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    follow_launcher()
    if world is None or world.size == 1:
        yield
        return
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:        # share the cores
        torch.set_num_threads(max(1, torch.get_num_threads() // processes_on_this_node(world.size)))
    if "MASTER_PORT" in os.environ and "MASTER_ADDR" in os.environ:
        init_method = "env://"
        os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank))
    else:
        init_method = f"tcp://{master_address(os.environ, address)}:{port or default_port(os.environ)}"
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        timeout = timedelta(minutes=timeout_minutes)
        store, _, _ = next(rendezvous(init_method, world.rank, world.size, timeout=timeout))
        dist.init_process_group(backend, store=dist.PrefixStore(_attempt(), store), rank=world.rank,
                                world_size=world.size, timeout=timeout)
    except dist.DistError as error:
        raise UserError(f"rank {world.rank} cannot meet the others through {init_method}: {error}") from None
    try:
        yield
    except UserError as error:
        if error.on_all_ranks:
            barrier()
        raise                                            # else the others may still wait in a collective: just leave
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        log.debug("", exc_info=True)
        raise LostRank(f"rank {world.rank} has lost another rank: {first_sentence(error)[-120:]}") from None
    barrier()                                            # nobody ends while another still waits for something from it


def _is_lost_connection(error: RuntimeError) -> bool:
    """gloo's and NCCL's ways to say that another process is gone."""
    words = "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "gloo/transport"
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def first_sentence(error: Exception) -> str:
    """What gloo says, without the line of its source before it and the advice after it."""
    return re.sub(r"^\[\S+:\d+\] ", "", str(error).partition("\n")[0].partition(". ")[0])


def leave(code: int) -> None:
    """End this rank now. Tearing Python down beside the threads that DDP leaves behind was seen to abort (code 134), to
    destroy the process group to hang (torch 2.6): it waits for a thread of gloo, which waits for Python's lock."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _attempt() -> str:
    """Restarted ranks must not find the addresses of the dead ones, which the agent's store still holds.

    Only on one node: agents of several count their restarts each on its own.
    """
    alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0) if alone else 0}"


def processes_on_this_node(size: int | None = None) -> int:
    """As the launcher says; otherwise all, ``size`` or the size of the process group."""
    for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"):
        if name in os.environ:
            return int(os.environ[name])
    tasks = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return int(tasks[0]) if tasks else size or world_size()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))              # on the CPU, through gloo: waits without touching a GPU


def gather_objects(value) -> list:
    """The plain Python values of all ranks, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The tensors of all ranks, which have one shape, one after another in rank order, on every rank."""
    if not dist.is_initialized():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def on_rank_zero(function: Callable):
    """Call ``function()`` on rank 0 alone and return its result on every rank; its UserErrors are raised on all.

    It may take longer than ranks wait for one another, but has no collectives: the others hear that it works.
    """
    if rank() == 0:
        with _signs_of_life():
            outcome = _outcome(function)
        _broadcast(outcome)
    else:
        while (outcome := _broadcast(None)) == WORKING:
            pass
    result, error = outcome
    if error:
        error.on_all_ranks = True                    # so that one rank prints it, not all
        raise error
    return result


def _outcome(function: Callable) -> tuple:
    try:
        return function(), None
    except UserError as error:
        return None, error
    except OSError as error:
        return None, DataError(f"{error.filename or 'a file'}: {error.strerror}")


def _broadcast(value):
    """Rank 0's ``value`` on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


@contextmanager
def _signs_of_life():
    """Broadcast WORKING every BEAT seconds of the block."""
    if not dist.is_initialized():
        yield
        return
    ended = threading.Event()

    def beat():
        with suppress(RuntimeError):                 # a rank is gone: the next collective says so
            while not ended.wait(BEAT):
                _broadcast(WORKING)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def deal(seeds: Sequence[int], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """This rank's batches: every world_size-th consecutive chunk, each with the position of its first seed.

    Each is listed when its turn comes: there may be billions.
    """
    starts = range(0, len(seeds), batch_size)[rank()::world_size()]
    return ((start, list(seeds[start:start + batch_size])) for start in starts)
