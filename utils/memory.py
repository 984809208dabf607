"""How much memory there is, and what glibc does with freed memory."""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3                  # from <malloc.h>
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process use freed memory again instead of giving it back and getting zeroed pages anew.

    On a CPU a network frees and asks for the same hundreds of megabytes in each call; by default glibc returns every
    large block to the kernel. The process keeps its peak instead, which it would reach again in the next call.

    Returns:
        Whether it took effect; False with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, LARGEST))


# Where Linux tells a container its limit, by version of its control groups.
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def available_memory(limits=CGROUP_LIMITS) -> int:
    """Bytes of memory that this machine has, or that this container may use of it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in limits:
        with suppress(OSError, ValueError):          # absent, or "max"
            memory = min(memory, int(path.read_text()))
    return memory
