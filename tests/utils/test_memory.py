"""Freed memory goes back to the kernel, or stays with the process, as asked."""

import re
import sys
from pathlib import Path

import pytest
import torch

from tests.faults.jobs import SERVER
from utils.memory import keep_freed_memory

BLOCK = 1 << 28                                              # bytes


def resident() -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def use_and_free() -> int:
    """How much more is resident after a block has been written and freed."""
    before = resident()
    block = torch.ones(BLOCK, dtype=torch.uint8)
    del block
    return resident() - before


def measure(answer) -> None:
    answer.send((use_and_free(), keep_freed_memory(), use_and_free()))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept():
    here, there = SERVER.Pipe(duplex=False)
    job = SERVER.Process(target=measure, args=(there,))
    job.start()
    returned, took_effect, kept = here.recv()
    job.join()
    assert returned < BLOCK / 10 and took_effect and kept > BLOCK * 0.9
