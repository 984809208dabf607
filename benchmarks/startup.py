"""Seconds from a command to its first step, its help, its import: real processes.

    python -m benchmarks.startup
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import alternate, arguments, report

ROOT = Path(__file__).parent.parent


def run(*command: str, until: str | None = None) -> float:
    """Seconds until the process ends, or prints ``until``."""
    start, reached = time.perf_counter(), None
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if until and until in line and reached is None:
            reached = time.perf_counter() - start
    if process.wait():
        raise RuntimeError("".join(lines))
    return reached or time.perf_counter() - start


def first_step(exp: str, device: str) -> float:
    """A run of one step on DIGITS, until its loss is logged."""
    return run("train_ddp.py", "--config", "digits.yml", "--exp", exp, "--overwrite", "--max_steps", "1",
               "--device", device, "--training.sample_num", "0", until="step 1/1")


def main():
    args = arguments(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as used:
        def fresh():
            with tempfile.TemporaryDirectory() as exp:
                return first_step(exp, args.device)

        jobs = {
            "train_ddp.py to its first step on DIGITS, first time": fresh,
            "the same, data packed before": lambda: first_step(used, args.device),
            "train_ddp.py --help": lambda: run("train_ddp.py", "--help"),
            "generate.py --help": lambda: run("generate.py", "--help"),
            "import torch": lambda: run("-c", "import torch"),
            "import runners.diffusion": lambda: run("-c", "import runners.diffusion"),
        }
        spent = {name: [] for name in jobs}

        def timed(name):
            spent[name].append(jobs[name]())
            return 1

        alternate({name: lambda name=name: timed(name) for name in jobs}, args.rounds)
        report("seconds to", {name: values[1:] for name, values in spent.items()}, baseline="import torch",
               unit="seconds", device=args.device)


if __name__ == "__main__":
    main()
