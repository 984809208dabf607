"""Which CPU this is: its name and the instruction sets that decide how fast a network runs on it."""

import platform
import re
from pathlib import Path

INFO = Path("/proc/cpuinfo")
# As Linux names them; the last that a CPU has tells its kind.
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
BF16 = {"avx512_bf16", "amx_bf16"}                   # multiply bf16 natively: twice the rate of float32, and more


def cpu_name(info: str | None = None) -> str:
    """Of the first core; ``info`` is the text of /proc/cpuinfo."""
    found = re.search(r"^model name\s*:\s*(.+)$", _read() if info is None else info, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def instruction_sets(info: str | None = None) -> list[str]:
    """Those of INSTRUCTION_SETS that this CPU has; an empty list where the system does not tell (not Linux, not x86).

    Args:
        info: Text of /proc/cpuinfo; default: this machine's.
    """
    found = re.search(r"^flags\s*:\s*(.+)$", _read() if info is None else info, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return [name for name in INSTRUCTION_SETS if name in flags]


def cpu_kind(sets: list[str]) -> str:
    """One word for the CPU's kind: the highest of its instruction sets, such as ``amx_bf16``."""
    return sets[-1] if sets else platform.machine()


def bf16_pays(sets: list[str]) -> bool:
    """Whether a network in bf16 is faster than in float32: only where the CPU multiplies bf16 itself."""
    return bool(BF16 & set(sets))


def _read() -> str:
    return INFO.read_text() if INFO.exists() else ""
