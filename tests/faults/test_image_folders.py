"""Image folders are resumed only with what belongs into them."""

import shutil

import numpy as np
import pytest
from PIL import Image

import generate
from tests.faults.bad_inputs import bomb_png


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained / "logs", tmp_path / "logs")
    common = ["--exp", str(tmp_path), "--doc", "digits", "--device", "cpu", "--no-fid", "--timesteps", "2", "--grid",
              "0", "--verbose", "critical"]
    return lambda *flags: generate.main([*common, *flags])


def test_rows_of_other_seeds_are_not_taken_for_the_ones_asked_for(run, tmp_path, capsys):
    assert run("--seeds", "0-3", "--save", "npz") == 0
    made = tmp_path / "image_samples" / "digits" / "samples_4x8x8x1.npz"
    before = made.read_bytes()
    assert run("--seeds", "10-13", "--save", "npz") == 2
    assert "seeds '0-3', now '10-13'" in capsys.readouterr().err and made.read_bytes() == before


@pytest.mark.parametrize("content", ["another size", "colours", "bomb", "cut"])
def test_a_foreign_picture_under_a_right_name_is_refused(run, tmp_path, capsys, content):
    assert run("--num_samples", "2") == 0
    image = tmp_path / "image_samples" / "digits" / "000001.png"
    if content in ("bomb", "cut"):
        image.write_bytes(bomb_png() if content == "bomb" else image.read_bytes()[:60])
    else:
        Image.fromarray(np.zeros((9, 9) if content == "another size" else (8, 8, 3), np.uint8)).save(image)
    assert run("--num_samples", "2") == 3
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("generate.py: ")]
    assert len(told) == 1 and "000001.png" in told[0] and "it will be made again" in told[0]
    image.unlink()
    assert run("--num_samples", "2") == 0


def test_what_a_killed_job_left_half_written_is_removed(run, tmp_path):
    assert run("--num_samples", "1") == 0
    left = tmp_path / "image_samples" / "digits" / ".000000.png.0123abcd.tmp"
    left.touch()
    assert run("--num_samples", "1") == 0
    assert not left.exists()
