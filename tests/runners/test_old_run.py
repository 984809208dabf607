"""A run folder of the first version (made by commit 3c8fc00, with ``model.ema_rate`` in its config.yml) still works."""

import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import train_ddp
from runners.diffusion import Diffusion
from tests.conftest import REPOSITORY

ARCHIVE = REPOSITORY / "tests" / "golden" / "old_run" / "run.tar.xz"
SETTINGS = {"timesteps": "20", "eta": 1.0, "clip_denoised": True}


@pytest.fixture
def old_run(tmp_path):
    """exp/logs/old: three steps of a tiny network, its values rounded so that the archive is small."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "logs" / "old", filter="data")
    return tmp_path / "logs" / "old"


def pixels(folder) -> np.ndarray:
    return np.stack([np.array(Image.open(folder / f"{seed:06d}.png")) for seed in (0, 5)]).astype(int)


def test_it_gives_the_same_images(old_run, tmp_path):
    flags = [word for key in ("timesteps", "eta") for word in (f"--{key}", str(SETTINGS[key]))]
    assert generate.main(["--exp", str(tmp_path), "--doc", "old", "--seeds", "0,5", *flags, "--clip_denoised",
                          "--no-fid", "-i", str(tmp_path / "new"), "--device", "cpu", "--verbose", "critical"]) == 0
    stored = pixels(old_run / "images")
    assert len(np.unique(stored)) > 50, "not only black and white"
    assert abs(pixels(tmp_path / "new") - stored).max() <= 1
    batch = next(Diffusion.from_run(old_run, device="cpu").sample([0, 5], **SETTINGS))
    assert abs(batch.images[:, 0].numpy() * 255 - stored).max() <= 1


def test_it_is_resumed(old_run, tmp_path):
    before = torch.load(old_run / "ckpt.pth", weights_only=True)
    assert train_ddp.main(["--exp", str(tmp_path), "--doc", "old", "--resume_training", "--max_steps", "4", "--device",
                           "cpu", "--training.sample_num", "0", "--verbose", "critical"]) == 0
    after = torch.load(old_run / "ckpt.pth", weights_only=True)
    assert (before["step"], after["step"]) == (3, 4)
    assert int(after["optimizer"]["state"][0]["step"]) == 4 and after["ema_updates"] == 4
    for name, average in before["ema"].items():                  # rate 0.99: a hundredth of the way to the new weights
        torch.testing.assert_close(after["ema"][name], 0.99 * average + 0.01 * after["model"][name])
    assert [json.loads(line)["step"] for line in (old_run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_sampling_adds_to_its_folder_of_images_or_says_what_differs(old_run, tmp_path, capsys):
    flags = ["--exp", str(tmp_path), "--doc", "old", "--timesteps", "20", "--no-fid", "-i", str(old_run / "images"),
             "--device", "cpu", "--verbose", "critical"]
    assert generate.main([*flags, "--seeds", "0", "--eta", "0.5"]) == 2
    assert "eta" in capsys.readouterr().err
