"""Kill everything at random moments for some minutes, and print what was lost: ``make soak``.

    python -m benchmarks.soak --minutes 10

Three faults in turn: SIGKILL while a checkpoint is written, SIGKILL of a whole run (1 and 2 ranks) at moments that
nobody chose until it is through, and SIGKILL of one rank under torchrun --max_restarts 1. A run must end with the very
weights and logged losses of an undisturbed one.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from runners.training.checkpoint import RunFolder
from tests.conftest import REPOSITORY, TINY
from tests.faults import jobs
from tests.faults.test_checkpoints import check_folder, kill_a_writer

STEPS, INTERVAL = 40, 2
PATIENCE = 600                           # seconds; others may use the machine as well
FLAGS = ["--training.max_steps", str(STEPS), "--training.snapshot_unit", "steps", "--training.snapshot_freq",
         str(INTERVAL)]


def writer_kills(folder: Path, count: int) -> Counter:
    """SIGKILL a process that does nothing but save; each restart goes on from what it finds."""
    figures, first = Counter(), 1
    for _ in range(count):
        saved, started = kill_a_writer(folder, first, random.uniform(0, 0.05))
        found = check_folder(RunFolder(folder), saved, started)
        figures.update({"kills while writing": 1, "whole checkpoints found after them": 1,
                        "checkpoints written": found - first + 1, "saves under way that were lost": started - found})
        first = found + 1
    return figures


def restarted_run(folder: Path, world: int, reference: Path) -> Counter:
    """Kill a run again and again until it is through; compare it with the undisturbed one."""
    figures, exp = Counter(), folder / "broken"
    while True:
        running = jobs.train_ranks(exp, world, *FLAGS, "--resume_training")
        running[-1].process.join(random.uniform(1.5, 4) if figures["kills of a run"] < 4 else PATIENCE)
        if running[-1].process.exitcode is not None:
            break
        reached = last_step(exp)
        for job in running:
            job.process.kill()
            job.process.join()
        figures["kills of a run"] += 1
        lost = reached - resumable_step(exp)
        figures["most steps lost"] = max(figures["most steps lost"], lost)
    codes = [job.wait(PATIENCE) for job in running]
    assert codes == [0] * world, [job.text for job in running]
    return figures + same_as(exp, reference)


def lost_rank(folder: Path, reference: Path) -> Counter:
    """torchrun brings a killed rank back."""
    exp = folder / "elastic"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts",
               "1", "train_ddp.py", *TINY, *jobs.HARD, *FLAGS, "--exp", str(exp)]
    job = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
    jobs.wait_until(lambda: (exp / "logs" / "digits" / "ckpt.pth").exists(), PATIENCE)
    ranks = jobs.children(job.pid)
    os.kill(random.choice(ranks), signal.SIGKILL)
    died = time.monotonic()
    assert job.wait(PATIENCE) == 0
    figures = Counter({"ranks killed under torchrun": 1, "seconds to the end after it": round(time.monotonic() - died)})
    return figures + same_as(exp, reference)


def same_as(exp: Path, reference: Path) -> Counter:
    same = jobs.same(jobs.state(exp), jobs.state(reference)) and jobs.metrics(exp) == jobs.metrics(reference)
    return Counter({"runs that equal the undisturbed one": int(same), "runs that differ": int(not same)})


def last_step(exp: Path) -> int:
    lines = jobs.metrics(exp) if (exp / "logs" / "digits" / "metrics.jsonl").exists() else []
    return lines[-1]["step"] if lines else 0


def resumable_step(exp: Path) -> int:
    found = RunFolder(exp / "logs" / "digits").load_newest()
    return found[0]["step"] if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--kills", type=int, default=50, help="while a checkpoint is written")
    args = parser.parse_args()
    end, figures, world = time.monotonic() + 60 * args.minutes, Counter(), 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        references = {n: folder / f"whole{n}" for n in (1, 2)}
        assert all(job.wait(PATIENCE) == 0 for n in (1, 2) for job in jobs.train_ranks(references[n], n, *FLAGS))
        figures += writer_kills(folder / "writer", args.kills)
        while time.monotonic() < end:
            with tempfile.TemporaryDirectory(dir=folder) as fresh:
                most = figures["most steps lost"]
                figures += restarted_run(Path(fresh), world, references[world])
                figures["most steps lost"] = max(most, figures["most steps lost"] - most)
                if world == 2 and time.monotonic() < end:
                    figures += lost_rank(Path(fresh), references[2])
            world = 3 - world
    for what in [*figures, "runs that differ"]:
        print(f"{figures[what]:8} {what}")
    return 1 if figures["runs that differ"] else 0


if __name__ == "__main__":
    sys.exit(main())
