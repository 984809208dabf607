"""benchmarks/fuzz.py works on every kind of file: sound ones are read, damaged ones end in order."""

import random

import pytest

from benchmarks.fuzz import main
from benchmarks.fuzz_kinds import KINDS


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "arguments"])
def test_what_is_sound_is_read(tmp_path, kind):
    """Else no mutation would get further than the first line of a reader."""
    make, read = KINDS[kind]
    make(tmp_path, random.Random(1))
    read(tmp_path, random.Random(1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_mutations_end_in_order(kind, capsys):
    assert main(["--only", kind, "--cases", "3", "--seed", "5"]) == 0, capsys.readouterr().out
    assert "3 mutations, 0 findings" in capsys.readouterr().out
