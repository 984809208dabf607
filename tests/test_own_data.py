"""docs/own-data.md: its blocks run, from sixty photographs to a grid; only the network is made smaller."""

import re

import numpy as np
import pytest
from PIL import Image

import dataset_tool
import fid
import generate
import train_ddp
from tests.conftest import REPOSITORY

SCRIPTS = {"dataset_tool": dataset_tool, "train_ddp": train_ddp, "generate": generate, "fid": fid}
SMALLER = {"train_ddp": "--model.ch 32 --model.ch_mult [1] --model.attn_resolutions [] --data.image_size 8 "
                        "--training.max_steps 2 --training.sample_timesteps 2 --device cpu --data.num_workers 0",
           "generate": "--device cpu --timesteps 2"}


def commands(block: int) -> list[list[str]]:
    """Words of the commands in a block, without ``python`` and what is commented."""
    text = re.findall(r"```sh\n(.*?)```", (REPOSITORY / "docs/own-data.md").read_text(), re.DOTALL)[block]
    return [line.partition(" #")[0].split()[1:] for line in text.splitlines()]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Sixty photographs of several sizes and kinds, lying and standing, grey and transparent, one of them damaged."""
    monkeypatch.chdir(tmp_path)
    random = np.random.RandomState(0)
    for i in range(60):
        path = tmp_path / "photos" / ("sea", "hills")[i % 2] / f"IMG_{i:04d}.{('jpg', 'png', 'webp')[i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = "L" if i % 7 == 0 else "RGBA" if i % 3 == 1 else "RGB"
        size = (30 + i, 90 - i)
        pixels = random.randint(0, 256, (size[1], size[0], 4), np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8
        Image.fromarray(pixels).convert(mode).save(path, exif=exif)
    (tmp_path / "photos/sea/IMG_0002.webp").write_bytes(b"broken")
    (tmp_path / "photos/video.mov").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("block", [0, 1])
def test_from_sixty_photographs_to_a_grid(photos, block, capsys):
    for script, *words in commands(block):
        name = script.removesuffix(".py")
        assert SCRIPTS[name].main([*words, *SMALLER.get(name, "").split()]) == 0, capsys.readouterr().err
    if block == 0:
        assert "2 classes of" in capsys.readouterr().out
        picture = np.array(Image.open(photos / "exp/image_samples/photos_grid.png"))
        assert picture.shape[0] >= 32 and picture.std() > 0


def test_the_command_of_the_reference_parses(photos):
    for script, *words in commands(2):
        assert SCRIPTS[script.removesuffix(".py")].parse(words)
