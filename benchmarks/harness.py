"""Side-by-side timing: A B A B in one run on one machine, medians after a warm-up, a table, a line in results.jsonl."""

import argparse
import json
import multiprocessing
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import numpy
import torch

from utils.cpu import cpu_name, instruction_sets

RESULTS = Path(__file__).with_name("results.jsonl")


def arguments(doc: str) -> argparse.ArgumentParser:
    """What most scripts here share: ``--device`` and ``--rounds``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, in turn")
    return parser


def alternate(calls: dict[str, Callable[[], int]], rounds: int = 5, warm_up: int = 1) -> dict[str, list[float]]:
    """Call each function in turn, round after round.

    Args:
        calls: Each does some work and returns how many items that was.
        rounds: Measurements of each.
        warm_up: Rounds before, not counted.

    Returns:
        Items per second, ``rounds`` of them for each name.
    """
    return _in_turn({name: partial(rate, call) for name, call in calls.items()}, rounds, warm_up)


def alternate_apart(makers: dict[str, Callable[[], Callable[[], int]]], rounds: int = 5, warm_up: int = 1
                    ) -> dict[str, list[float]]:
    """The same, each in a process of its own: allocator, threads and caches of one take no part in another.

    Args:
        makers: Each makes, in its process, what ``alternate`` calls. Picklable.
    """
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        processes = {name: stack.enter_context(ProcessPoolExecutor(1, spawn)) for name in makers}
        for name, process in processes.items():
            process.submit(_make, makers[name]).result()
        calls = {name: partial(_result, process) for name, process in processes.items()}
        return _in_turn(calls, rounds, warm_up)


def _in_turn(measure: dict[str, Callable[[], float]], rounds: int, warm_up: int) -> dict[str, list[float]]:
    rates = {name: [] for name in measure}
    for _ in range(warm_up + rounds):
        for name, once in measure.items():
            rates[name].append(once())
    return {name: values[warm_up:] for name, values in rates.items()}


def rate(call: Callable[[], int]) -> float:
    """Items per second of one call."""
    synchronize()
    start = time.perf_counter()
    items = call()
    synchronize()
    return items / (time.perf_counter() - start)


def _make(maker: Callable) -> None:
    global _made
    _made = maker()


def _rate_of_made() -> float:
    return rate(_made)


def _result(process: ProcessPoolExecutor) -> float:
    return process.submit(_rate_of_made).result()


def report(title: str, rates: dict[str, list[float]], *, baseline: str, unit: str = "images/s",
           precision: str = "fp32", **about) -> str:
    """Print and return a Markdown table of medians and ratios to ``baseline``; append all of it to results.jsonl.

    ``about`` is anything plain that is needed to repeat the measurement.
    """
    medians = {name: statistics.median(values) for name, values in rates.items()}
    rows = [f"| {title} | {unit} | range | ratio |", "|---|---|---|---|"]
    rows += [f"| {name} | {medians[name]:,.4g} | {min(values):,.4g} - {max(values):,.4g} | "
             f"{medians[name] / medians[baseline]:.2f} |" for name, values in rates.items()]
    table = "\n".join(rows)
    print(table, flush=True)
    line = {"title": title, "unit": unit, "rates": rates, "medians": medians, "baseline": baseline,
            "precision": precision, "command": " ".join(sys.argv), **machine(), **about}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")
    return table


def table(title: str, header: list[str], rows: list[list], **about) -> str:
    """Print and return a Markdown table of anything else that was measured; append it to results.jsonl."""
    text = markdown([title, *header], rows)
    print(text, flush=True)
    line = {"title": title, "header": header, "rows": rows, "command": " ".join(sys.argv), **machine(), **about}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")
    return text


def markdown(header: list[str], rows: list[list]) -> str:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join(lines + [f"| {' | '.join(map(_shown, row))} |" for row in rows])


def _shown(value) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def matrix_rate(dtype: torch.dtype, device="cpu", rounds: int = 10) -> float:
    """FLOP/s of a product of two square matrices, what the machine can do: the best of ``rounds``."""
    side = 8192 if torch.device(device).type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    rates = alternate({"matrix": lambda: (a @ b).shape[0]}, rounds, warm_up=2)["matrix"]
    return max(rates) * 2 * side**2


def in_fresh_process(function: Callable, *args):
    """``function(*args)`` in a process of its own: no memory, cache or thread of this one takes part."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(function, *args).result()


def peak_memory(work: Callable) -> tuple:
    """What ``work()`` returns, and the GiB of host memory that it takes at its peak beyond what is in use before.

    Linux only. The kernel's mark of the peak is reset first: it holds what importing took, and ``ru_maxrss``, which
    cannot be reset, starts at the peak of the parent process.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    result = work()
    return result, (_status_bytes("VmHWM") - before) / 2**30


def _status_bytes(key: str) -> int:
    return int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024


def machine() -> dict:
    """Where and with what a measurement was made."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "cpu": cpu_name(),
            "instructions": instruction_sets(), "gpu": gpu,
            "cores": torch.multiprocessing.cpu_count(), "threads": torch.get_num_threads(),
            "python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}


def synchronize() -> None:
    """Wait for the GPU, if one is in use: call it before every look at the clock."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
