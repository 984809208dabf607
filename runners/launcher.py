"""Start the ranks of a command on this node, under torchrun's agent."""

import logging
import os
import signal
import sys
from collections.abc import Mapping

from runners.distributed import DEFAULT_PORT, LAUNCHER
from utils.errors import LostRank, UserError

SAVING_SECONDS = "600"                               # what ranks get between a signal and being killed


def launch(script: str, argv: list[str], *, processes: int, nodes: int = 1, node_rank: int = 0,
           address: str | None = None, port: int | None = None, max_restarts: int = 0) -> int:
    """Run ``python script argv`` in ``processes`` ranks on this node under torchrun's agent.

    Returns:
        0, the exit code of the first rank that failed, or 128 + the signal that ended this launcher.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def forward(signum, frame):
        raise SignalException(f"got {signum}", signal.Signals(signum))

    several = nodes > 1
    if several and not address:
        raise UserError(f"--num_proc_node {nodes} needs --master_address, the host of node 0")
    if several and max_restarts:
        raise UserError("--max_restarts is for one node; on several, start torchrun with its c10d rendezvous")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SAVING_SECONDS)            # which LaunchConfig reads
    config = LaunchConfig(
        min_nodes=nodes, max_nodes=nodes, nproc_per_node=processes, max_restarts=max_restarts, run_id="sa-ddim",
        rdzv_backend="static" if several else "c10d",
        rdzv_endpoint=f"{address or '127.0.0.1'}:{port or (DEFAULT_PORT if several else 0)}",
        rdzv_configs={"rank": node_rank, "timeout": 900} if several else {},
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[LAUNCHER] = str(os.getpid())
    signal.signal(signal.SIGUSR1, forward)
    try:
        elastic_launch(config, sys.executable)(script, *argv)
    except SignalException as received:
        return 128 + received.sigval
    except ChildFailedError as failed:
        return _told(failed.failures)
    finally:
        os.environ.pop(LAUNCHER, None)
    return 0


def _told(failures: Mapping) -> int:
    """The exit code of a job whose ranks failed; one that was killed is named, for its own log has no line of it."""
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    reasons = [code for code in codes.values() if code in (2, 3, 4)]
    killed = [rank for rank, code in sorted(codes.items()) if code == -signal.SIGKILL] or [
        rank for rank, code in sorted(codes.items()) if code < 0]
    if reasons:                                          # a rank that knew why has said so
        return reasons[0]
    first = min(failures.values(), key=lambda failure: failure.timestamp)
    if killed:
        who = f"rank {killed[0]}" if len(killed) == 1 else f"ranks {', '.join(map(str, killed))}"
        raise LostRank(f"{who} died (signal {-codes[killed[0]]}); resume with the same command and "
                       "--resume_training, or start with --max_restarts N", 128 - codes[killed[0]])
    return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
