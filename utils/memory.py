"""What glibc does with freed memory."""

import ctypes
import sys

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
