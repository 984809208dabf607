"""Scripts as real processes that break at an exact moment.

Jobs are forked from a server that has imported what they need, so that one starts in milliseconds; an optimizer alone
takes more than a second for torch._dynamo. ``faults`` run in the job before the script: most wrap the training step,
since that is the clock of everything.
"""

import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import time
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path

import torch

from tests.conftest import TINY

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch._dynamo", "torch.utils.tensorboard", "matplotlib.backends.backend_agg",
                               "matplotlib.figure", "runners.diffusion", "train_ddp", "generate", "tests.faults.jobs"])
HARD = ["--model.dropout", "0.1", "--input_perturbation", "0.1", "--num_consecutive_steps", "2", "--lamda", "1",
        "--optim.lr_schedule", "cosine", "--optim.warmup_steps", "3", "--training.sample_num", "0"]
PATIENCE = 300                                       # seconds; a busy machine is no failure
EVERY_TWO = ["--training.snapshot_unit", "steps", "--training.snapshot_freq", "2"]


class Job:
    """``script.main(argv)`` in a process of its own; or ``script(*argv)`` where it is a function."""

    def __init__(self, script, argv: list, faults=(), env: dict | None = None, context=SERVER):
        self._printed, there = context.Pipe(duplex=False)
        self.process = context.Process(target=_run, args=(script, argv, there, tuple(faults), env or {}))
        self.process.start()
        there.close()

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code; negative after a signal."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            for pid in [*children(self.process.pid), self.process.pid]:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"still running after {seconds} s: {self.text}")
        return self.process.exitcode

    @cached_property
    def text(self) -> str:
        """What it printed; ask when it has ended."""
        with open(os.dup(self._printed.fileno()), errors="replace") as file:
            return file.read()


def _run(script, argv, output, faults, env):
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)         # which a suite in the background has not
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)    # as in a script
    torch.set_num_threads(1)                         # no busy waiting for a core that another job has
    for fault in faults:
        fault()
    raise SystemExit(script(*argv) if callable(script) else import_module(script).main(argv))


def train(exp: Path, *flags, faults=(), env=None) -> Job:
    exp.mkdir(exist_ok=True)
    return Job("train_ddp", [*TINY, *HARD, "--exp", str(exp), *flags], faults, env)


def train_ranks(exp: Path, world: int, *flags, faults: dict | None = None) -> list[Job]:
    """``faults`` by rank. One rank: no process group."""
    if world == 1:
        return [train(exp, *flags, faults=(faults or {}).get(0, ()))]
    exp.mkdir(exist_ok=True)
    return ranks("train_ddp", [*TINY, *HARD, "--exp", str(exp), *flags], world, faults or {})


def ranks(script: str, argv: list[str], world: int = 2, faults: dict | None = None, context=SERVER) -> list[Job]:
    """One job for each rank, with the variables that torchrun would give it."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    return [Job(script, argv, (faults or {}).get(rank, ()), address | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                context) for rank in range(world)]


def ranks_with(modules: list[str], script: str, argv: list[str]) -> int:
    """In a job: two ranks forked from it, so that what only they need is imported once. Prints what they print."""
    for name in modules:
        import_module(name)
    pair = ranks(script, argv, context=multiprocessing.get_context("fork"))
    codes = [each.wait(120) for each in pair]
    print(*(each.text for each in pair), sep="\n")
    return max(map(abs, codes))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---------------------------------------------------------------------------------------------------------- faults

def after_step(number: int, action, saved: bool = False) -> None:
    """Call ``action()`` when step ``number`` (from 1) is done; with ``saved`` also the write that was under way."""
    from runners.diffusion import Diffusion

    original = Diffusion.train_step

    def train_step(self, session):
        original(self, session)
        if session.step == number:
            if saved:
                session.writer._wait()
            action()

    Diffusion.train_step = train_step


def send(*signals: int) -> None:
    for signum in signals:
        os.kill(os.getpid(), signum)


def group_terminated_after(step: int) -> list:
    """As torchrun, systemd or a container does it: the signal reaches the workers, too, and is not their parent's,
    which PyTorch takes for the end of its data; some time then goes by."""
    return [os.setsid, partial(after_step, step, _terminate_group)]


def _terminate_group() -> None:
    subprocess.run(["kill", "-TERM", "--", f"-{os.getpgrp()}"], start_new_session=True, check=True)
    time.sleep(1)


def killed_after(step: int) -> list:
    return [partial(after_step, step, partial(send, signal.SIGKILL))]


def signalled_after(step: int, *signals: int) -> list:
    return [partial(after_step, step, partial(send, *signals))]


def signalled_while_drawing(signum: int) -> list:
    """The signal comes when the first sheet of samples begins."""
    return [partial(_signal_in_sheet, signum)]


def _signal_in_sheet(signum: int) -> None:
    from runners.training import session

    original = session.training_sheet

    def training_sheet(*given):
        send(signum)
        return original(*given)

    session.training_sheet = training_sheet


def signalled_while_measuring(signum: int) -> list:
    """The same during the FID of a snapshot; Inception and its reference are not needed for that."""
    return [partial(_signal_in_fid, signum)]


def _signal_in_fid(signum: int) -> None:
    from runners.evaluation import references
    from runners.training import session

    class Measuring:
        def __init__(self, config, device):
            pass

        def measure(self, diffusion):
            send(signum)
            return {"fid": 1.0, "name": "FID-5k"}

    references.find_reference = lambda *given, **more: None
    session.PeriodicFid = Measuring


def signalled_at_seed(seed: int, signum: int) -> list:
    """While generate.py makes the batch that begins with this image."""
    return [partial(_signal_at_seed, seed, signum)]


def _signal_at_seed(seed: int, signum: int) -> None:
    from runners.sampling.sampler import Sampler

    original = Sampler.__call__

    def call(self, seeds, *more):
        if seeds[0] == seed:
            send(signum)
        return original(self, seeds, *more)

    Sampler.__call__ = call


def limit_files(size: int) -> None:
    """No file may grow beyond ``size`` bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_disk(first: int, last: int | None = None) -> list:
    """The disk is full from step ``first`` on, until ``last``."""
    free = [partial(after_step, last, partial(limit_files, resource.RLIM_INFINITY))] if last else []
    return [partial(after_step, first, partial(limit_files, 2000), saved=True), *free]


def hold_after(step: int, reached, released) -> list:
    """Stop in step ``step`` until the event ``released`` is set."""
    return [partial(after_step, step, partial(_hold, reached, released))]


def _hold(reached, released) -> None:
    reached.set()
    released.wait(PATIENCE)


# --------------------------------------------------------------------------------------------------------- results

def state(exp: Path) -> dict:
    return torch.load(exp / "logs" / "digits" / "ckpt.pth", weights_only=True)


def metrics(exp: Path) -> list[dict]:
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (exp / "logs" / "digits" / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines]


def same(a, b) -> bool:
    """Bit for bit, in nested containers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def files(folder: Path) -> dict:
    """What lies below a folder: content of each file, None for folders."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def wait_until(condition, seconds: float = PATIENCE) -> None:
    """For what another process does and cannot tell: its files and its death."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened within {seconds} s"
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """Processes that ``pid`` has started, such as the ranks of a launcher."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def alive(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"
