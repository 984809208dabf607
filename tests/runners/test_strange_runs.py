"""Run folders of strangers: what lies in them leads nowhere else."""

import os

import pytest
import torch

import train_ddp
from models import MODELS, load_weights
from tests.conftest import TINY
from utils.errors import DataError


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


def test_a_network_beyond_the_memory_is_one_line(tmp_path, monkeypatch, capsys):
    def too_large(config):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nto allocate 9 TB")

    monkeypatch.setitem(MODELS, "unet", too_large)
    assert train(tmp_path, "--max_steps", "1") == 2
    error = capsys.readouterr().err
    assert "the network of this configuration cannot be made here" in error and error.count("\n") == 1


def test_a_digest_of_what_is_no_dense_tensor_is_one_line(tmp_path):
    for weights in (torch.zeros(2).to_sparse(), torch.zeros(2, 2).to_sparse_csr()):
        torch.save({"format_version": 1, "model": {"w": weights}, "digests": {"model": "0" * 16}}, tmp_path / "w.pth")
        with pytest.raises(DataError, match="another digest"):
            load_weights(torch.nn.Linear(1, 1), tmp_path / "w.pth")
