"""Run folders of strangers: what lies in them leads nowhere else."""

import os

import pytest

import train_ddp
from tests.conftest import TINY


def train(exp, *flags):
    return train_ddp.main([*TINY, "--exp", str(exp), *flags, "--verbose", "critical"])


@pytest.mark.parametrize("name", ["metrics.jsonl", "stdout.txt"])
def test_what_is_appended_to_in_a_folder_is_a_file_of_its_own(tmp_path, capsys, name):
    """A stranger's run could lead to a file of the user, or to a pipe that nobody reads."""
    folder, outside = tmp_path / "logs" / "digits", tmp_path / "precious"
    folder.mkdir(parents=True)
    (folder / name).symlink_to(outside)
    assert train(tmp_path, "--max_steps", "1") == 3
    assert f"{name}: is a link" in capsys.readouterr().err and not outside.exists()
    outside.write_text("kept\n")
    train(tmp_path, "--max_steps", "1")                        # metrics.jsonl is written anew, and is then no link
    assert outside.read_text() == "kept\n"
    (folder / name).unlink()
    capsys.readouterr()
    os.mkfifo(folder / name)
    assert train(tmp_path, "--max_steps", "2", "--resume_training") == 3
    assert f"{name}: is not a file but a pipe" in capsys.readouterr().err
