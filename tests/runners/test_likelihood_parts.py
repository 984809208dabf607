"""Batches that a stopped likelihood has left: sound ones are merged, damaged ones are one line."""

import zipfile

import numpy as np
import pytest

from runners.diagnosis.likelihood import merged
from utils.errors import DataError

WHOLE = {"sums": np.ones((3, 2)), "squares": np.full((3, 2), 2.0), "total": np.ones(2), "prior": np.zeros(2)}


def test_sound_batches_are_merged(tmp_path):
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", **WHOLE)
    rows, summary = merged([tmp_path / "a.npz", tmp_path / "b.npz"], [0, 5])
    assert summary["num_images"] == 4 and summary["bits_per_dim"] == 1.0
    assert [row["t"] for row in rows] == [0, 5] and rows[0]["bits"] == 0.5


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, array in {**WHOLE, "sums": np.zeros((3, 2**25))}.items():
            with archive.open(f"{key}.npy", "w") as file:
                np.save(file, array)


def encrypted(path):
    """By its flags alone."""
    content = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = content.find(mark)
        while at >= 0:
            content[at + flags] |= 1
            at = content.find(mark, at + 1)
    path.write_bytes(content)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "flipped": lambda path: path.write_bytes(path.read_bytes().replace(b"\0\0\0\0\0\0\xf0?", b"\0\0\0\0\0\1\xf0?", 1)),
    "text": lambda path: path.write_text("no archive"), "empty": lambda path: path.write_bytes(b""),
    "bomb": bomb, "encrypted": encrypted,
    "keys": lambda path: np.savez(path, **{key: WHOLE[key] for key in ("sums", "total")}),
    "steps": lambda path: np.savez(path, **{**WHOLE, "sums": np.ones((3, 5))}),
    "rank": lambda path: np.savez(path, **{**WHOLE, "total": np.ones((2, 2))}),
    "number": lambda path: np.savez(path, **{**WHOLE, "prior": np.ones(3)}),
    "kind": lambda path: np.savez(path, **{**WHOLE, "squares": np.full((3, 2), "x")}),
    "object": lambda path: np.savez(path, **{**WHOLE, "total": np.array([None, 1])}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_batches_are_one_line(tmp_path, damage):
    np.savez(tmp_path / "a.npz", **WHOLE)
    DAMAGES[damage](tmp_path / "a.npz")
    with pytest.raises(DataError, match="a.npz: not readable: .*; remove it and start again") as refused:
        merged([tmp_path / "a.npz"], [0, 5])
    assert "\n" not in str(refused.value)
