"""What a dry run predicts."""

import logging
import time

import numpy as np
import pytest
import torch
from PIL import Image

import train_ddp
from configs.schema import Config
from runners.diffusion import Diffusion
from runners.training import dry_run
from runners.training.dry_run import digits, in_words, room_in_words, training_memory
from runners.training.plan import Plan
from tests.conftest import TINY
from tests.faults import jobs
from utils.memory import available_memory


def test_activation_checkpointing_is_seen():
    further = []
    for checkpointing in (False, True):
        config = Config.model_validate({
            "data": {"dataset": "DIGITS", "image_size": 32},
            "model": {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 2, "attn_resolutions": []},
            "training": {"activation_checkpointing": checkpointing}})
        diffusion, plan = Diffusion(config, "cpu"), Plan.make(config.training, 1000, 1)
        further.append(training_memory(diffusion, torch.zeros(2, *config.data.shape, dtype=torch.uint8), plan)[2])
    assert 0 < further[1] < 0.8 * further[0]


@pytest.mark.parametrize(("optimizer", "copies"), [("Adam", 5), ("SGD", 4), ("RMSProp", 4)])
def test_the_moments_are_those_of_the_optimizer(optimizer, copies):
    """Weights, gradients, an average, and of SGD and RMSProp one moment."""
    config = Config.model_validate({
        "data": {"dataset": "DIGITS", "image_size": 8}, "optim": {"optimizer": optimizer},
        "model": {"ch": 32, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": []}})
    diffusion, plan = Diffusion(config, "cpu"), Plan.make(config.training, 1000, 1)
    fixed = training_memory(diffusion, torch.zeros(2, *config.data.shape, dtype=torch.uint8), plan)[1]
    assert fixed == 4 * copies * sum(p.numel() for p in diffusion.model.parameters())


def test_two_ranks_say_once_what_is_wrong(tmp_path):
    argv = ["--config", "cifar10_tiny.yml", "--device", "cpu", "--exp", str(tmp_path), "--dry_run"]
    ranks = jobs.ranks("train_ddp", argv)
    assert [rank.wait() for rank in ranks] == [2, 2]
    assert sum(rank.text.count("ZIP needs data.root") for rank in ranks) == 1


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, pixels in enumerate(np.random.RandomState(0).randint(0, 256, (120, 8, 8), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return folder


def rehearse(photos, *flags):
    return train_ddp.main([*TINY, "--exp", str(photos.parent / "exp"), "--dry_run", "--data.dataset", "FOLDER",
                           "--data.root", str(photos), *flags])


def test_the_first_hundred_images_are_tried(photos, capsys):
    assert rehearse(photos) == 0
    assert "120; the first 100 are readable" in capsys.readouterr().out
    for name in ("050.png", "110.png"):
        (photos / name).write_bytes((photos / name).read_bytes()[:50])
    assert rehearse(photos) == 3
    error = capsys.readouterr().err
    assert "050.png" in error and "1 unreadable of the first 100, data.skip_bad allows 0" in error
    assert rehearse(photos, "--data.skip_bad", "2") == 0
    assert "1 of the first 100 are unreadable" in capsys.readouterr().out
    assert not (photos.parent / "exp").exists(), "nothing is written"


def test_time_and_memory_of_all_ranks_are_estimated(photos, capsys, monkeypatch):
    """A clock that gives each step three seconds: two images in it, eight in the batch, 20 steps in the run."""
    now, make = [0.0], dry_run._make_step

    def slow(diffusion, images):
        step = make(diffusion, images)
        return lambda: now.__setitem__(0, now[0] + 3) or step()

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(dry_run, "_make_step", slow)
    assert rehearse(photos, "--training.max_steps", "20") == 0
    printed = capsys.readouterr().out
    assert "about 4.0 minutes for the run, 12 s for a step" in printed and "enough" in printed
    monkeypatch.setattr(dry_run, "available_memory", lambda: 1000)
    assert rehearse(photos) == 0
    assert "TOO LITTLE: lower training.micro_batch_size" in capsys.readouterr().out


def test_a_data_set_on_the_device_takes_its_memory(photos, capsys):
    for cache in ("mmap", "device"):
        assert rehearse(photos, "--data.cache", cache) == 0
        printed = capsys.readouterr().out
        assert ("for the data set" in printed) == (cache == "device")


def test_a_data_set_may_be_too_much(photos, capsys, monkeypatch):
    for size, verdict in ((0, "enough"), (2**50, "TOO LITTLE")):
        monkeypatch.setattr(dry_run, "resident_bytes", lambda *args, size=size: size)
        assert rehearse(photos) == 0
        assert verdict in capsys.readouterr().out


def test_it_says_what_it_does(photos, caplog):
    with caplog.at_level(logging.INFO):
        assert rehearse(photos, "--verbose", "info") == 0
    said = [text for text in ("looking at the data", "building the network", "steps with one and with two images")
            if text in caplog.text]
    assert len(said) == 3


def test_steps_that_no_sheet_can_have_are_told_before_training(photos, capsys):
    assert rehearse(photos, "--diffusion.skip_type", "leading", "--diffusion.steps_offset", "1",
                    "--training.sample_timesteps", "1000", "--training.sample_num", "4") == 2
    assert "sheets of samples: training.sample_timesteps 1000, diffusion.skip_type leading" in capsys.readouterr().err


def test_words():
    cpu, gib = torch.device("cpu"), 2**30
    assert room_in_words(3 * gib, 2 * gib, 4, cpu).startswith("its 4 processes need about 3.00 GiB of 2.00: TOO LITTLE")
    assert room_in_words(gib, 2 * gib, 1, cpu) == "needed: about 1.00 GiB of 2.00: enough"
    assert [in_words(s) for s in (30, 90, 3 * 3600, 10 * 86400)] == ["30 seconds", "1.5 minutes", "3.0 hours",
                                                                     "10.0 days"]
    assert [digits(s) for s in (0.123, 1.94, 12.3, 140.2)] == ["0.12", "1.9", "12", "140"]


def test_a_container_has_what_it_may_use(tmp_path):
    limit = tmp_path / "memory.max"
    whole = available_memory([tmp_path / "absent"])
    limit.write_text("max\n")
    assert available_memory([limit]) == whole > 2**20
    limit.write_text("1048576\n")
    assert available_memory([limit]) == 2**20


def test_absent_data_are_listed_with_the_place_that_was_named(photos, tmp_path, capsys):
    assert rehearse(photos, "--data.root", str(tmp_path / "elsewhere")) == 0
    assert f"data set FOLDER in data.root {tmp_path / 'elsewhere'} (noise" in capsys.readouterr().out
