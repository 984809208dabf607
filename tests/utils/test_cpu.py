"""What /proc/cpuinfo tells about a CPU."""

import pytest

from utils.cpu import bf16_pays, cpu_kind, cpu_name, instruction_sets

FLAGS = "flags\t\t: fpu sse2 avx avx2 "


@pytest.mark.parametrize("more, kind, pays", [
    ("", "avx2", False), ("avx512f avx512vl", "avx512f", False), ("avx512f avx512_bf16", "avx512_bf16", True),
    ("avx512f avx512_bf16 amx_tile amx_bf16", "amx_bf16", True), ("avx512f amx_tile", "avx512f", False)])
def test_kinds(more, kind, pays):
    sets = instruction_sets(f"model name\t: Some CPU @ 2 GHz\n{FLAGS}{more}\n")
    assert (cpu_kind(sets), bf16_pays(sets)) == (kind, pays)


def test_a_system_that_does_not_tell():
    assert instruction_sets("") == [] and not bf16_pays([]) and cpu_kind([])
    assert cpu_name("") and cpu_name("model name\t: Some CPU @ 2 GHz\n") == "Some CPU @ 2 GHz"
