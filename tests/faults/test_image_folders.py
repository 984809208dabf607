"""Image folders are resumed only with what belongs into them."""

import io
import json
import math
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from tests.faults import jobs
from tests.faults.bad_inputs import bomb_png


@pytest.fixture
def run(exp):
    common = ["--exp", str(exp), "--doc", "digits", "--device", "cpu", "--no-fid", "--timesteps", "2", "--grid",
              "0", "--verbose", "critical"]
    return lambda *flags: generate.main([*common, *flags])


def test_rows_of_other_seeds_are_not_taken_for_the_ones_asked_for(run, tmp_path, capsys):
    assert run("--seeds", "0-3", "--save", "npz") == 0
    made = tmp_path / "image_samples" / "digits" / "samples_4x8x8x1.npz"
    before = made.read_bytes()
    assert run("--seeds", "10-13", "--save", "npz") == 2
    assert "made with other settings (seeds was '0-3', is '10-13')" in capsys.readouterr().err
    assert made.read_bytes() == before


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


@pytest.mark.parametrize(("signum", "save"), [(signal.SIGTERM, "png"), (signal.SIGINT, "png"), (signal.SIGTERM, "npz")])
def test_a_stopped_job_says_so_and_goes_on(exp, signum, save):
    request = ["--exp", str(exp), "--doc", "digits", "--device", "cpu", "--no-fid", "--timesteps", "2", "--grid",
               "0", "--num_samples", "6", "--batch_size", "2", "--save", save]
    stopped = jobs.Job("generate", request, jobs.signalled_at_seed(4, signum))
    assert stopped.wait() == 128 + signum, stopped.text
    folder = exp / "image_samples" / "digits"
    assert "Traceback" not in stopped.text and f"what is made so far is kept in {folder}" in stopped.text
    assert stopped.text.splitlines()[-1] == f"generate.py: stopped by {signum.name}"
    kept = [f"{seed:06d}.png" for seed in range(4)] if save == "png" else []
    assert sorted(path.name for path in folder.glob("*.png")) == kept
    assert not list(folder.glob(".*.tmp"))
    goes_on = jobs.Job("generate", request)
    assert goes_on.wait() == 0 and "4 images of rank 0's share were there already" in goes_on.text


def test_what_a_killed_job_left_half_written_is_removed(run, tmp_path):
    assert run("--num_samples", "1") == 0
    left = tmp_path / "image_samples" / "digits" / ".000000.png.0123abcd.tmp"
    left.touch()
    assert run("--num_samples", "1") == 0
    assert not left.exists()


def test_other_settings_are_told_one_by_one(run, capsys):
    assert run("--num_samples", "1", "--eta", "0.5") == 0
    assert run("--num_samples", "1", "--eta", "0.25") == 2
    error = capsys.readouterr().err
    assert "made with other settings (sampler.eta was 0.5, is 0.25); choose" in error and "{" not in error


def test_a_network_that_its_weights_do_not_tell_of_is_told(run, tmp_path, capsys):
    """Folders from before the manifest knew of it go on."""
    assert run("--num_samples", "1") == 0
    manifest = tmp_path / "image_samples" / "digits" / "manifest.json"
    stored = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**stored, "network": {**stored["network"], "attn_resolutions": [99]}}))
    assert run("--num_samples", "1") == 2
    assert "network.attn_resolutions was [99], is [" in capsys.readouterr().err
    del stored["network"]
    manifest.write_text(json.dumps(stored))
    assert run("--num_samples", "1") == 0


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda file: file.write_text("[1]"), "no manifest of this program"),
    (lambda file: file.write_text("[" * 10**5), "not readable"),
    (lambda file: file.symlink_to("/dev/zero"), "is not a file but a device"),
    (lambda file: os.mkfifo(file), "is not a file but a pipe")], ids=["list", "deep", "endless", "pipe"])
def test_a_manifest_of_another_form_is_one_line(run, tmp_path, capsys, spoil, message):
    assert run("--num_samples", "1") == 0
    file = tmp_path / "image_samples" / "digits" / "manifest.json"
    file.unlink()
    spoil(file)
    assert run("--num_samples", "1") == 3
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize("spoil", [lambda file: file.symlink_to("/dev/zero"), os.mkfifo], ids=["endless", "pipe"])
def test_a_picture_that_is_no_file_is_not_waited_for(run, tmp_path, capsys, spoil):
    assert run("--num_samples", "1") == 0
    image = tmp_path / "image_samples" / "digits" / "000000.png"
    image.unlink()
    spoil(image)
    assert run("--num_samples", "1") == 3
    assert "000000.png: is not a file but a" in capsys.readouterr().err


def saved(save, *arrays, **named) -> bytes:
    file = io.BytesIO()
    save(file, *arrays, **named)
    return file.getvalue()


@pytest.mark.parametrize("name", ["samples_2x8x8x1.npz", ".samples_2x8x8x1.npy", ".samples_2x8x8x1.done.npy"])
@pytest.mark.parametrize("spoil", [
    lambda file: file.write_bytes(b"PK no archive"), lambda file: file.write_bytes(saved(np.save, np.zeros(3))),
    lambda file: file.write_bytes(saved(np.savez, arr_0=np.zeros((2, 4, 4, 1), np.uint8))), os.mkfifo],
    ids=["text", "numbers", "smaller", "pipe"])
def test_damaged_rows_are_one_line(run, tmp_path, capsys, name, spoil):
    assert run("--num_samples", "2", "--save", "npz") == 0
    folder = tmp_path / "image_samples" / "digits"
    made = folder / "samples_2x8x8x1.npz"
    if name != made.name:                                    # as a killed job leaves them
        with np.load(made) as rows:
            np.save(folder / ".samples_2x8x8x1.npy", rows["arr_0"])
        np.save(folder / ".samples_2x8x8x1.done.npy", np.ones(2, np.uint8))
        made.unlink()
    (folder / name).unlink()
    spoil(folder / name)
    capsys.readouterr()
    assert run("--num_samples", "2", "--save", "npz") == 3
    error = capsys.readouterr().err
    assert name in error and error.count("\n") == 1


# ------------------------------------------------------------------------------------------------------ --save npz

def job(exp, *flags, faults=()):
    return jobs.Job("generate", ["--exp", str(exp), "--doc", "digits", "--device", "cpu", "--no-fid", "--timesteps",
                                 "2", "--grid", "0", "--verbose", "critical", "--save", "npz", *flags], faults)


def test_a_disk_without_room_for_all_rows_is_found_before_they_are_mapped(run, tmp_path):
    """Whoever writes to a mapped page that the disk has no room for dies of SIGBUS."""
    full = job(tmp_path, "--num_samples", "20000", faults=[partial(jobs.limit_files, 100_000)])
    assert full.wait() == 3, full.text
    assert "--save npz needs 1.2 MiB" in full.text and full.text.count("\n") == 1, full.text
    folder = tmp_path / "image_samples" / "digits"
    assert {p.name for p in folder.iterdir()} <= {"manifest.json"}
    assert job(tmp_path, "--num_samples", "20000", "--seeds", "0-19999", "--dry_run").wait() == 0


def test_all_blocks_of_the_rows_are_there_from_the_start(tmp_path):
    from runners.sampling.writers import NpzWriter

    writer = NpzWriter(tmp_path, 1000, (3, 32, 32))
    assert writer.rows.stat().st_blocks * 512 >= 1000 * 3 * 32 * 32


def killed_before_cleaning() -> None:
    from runners.sampling.writers import NpzWriter

    NpzWriter._remove_rows = lambda self: os.kill(os.getpid(), signal.SIGKILL)


def test_rows_left_by_a_kill_after_the_rename_are_removed(run, tmp_path):
    killed = job(tmp_path, "--num_samples", "4", faults=[killed_before_cleaning])
    assert killed.wait() == -signal.SIGKILL
    folder = tmp_path / "image_samples" / "digits"
    made = folder / "samples_4x8x8x1.npz"
    before = made.read_bytes()
    assert list(folder.glob(".samples*"))
    assert run("--num_samples", "4", "--save", "npz") == 0
    assert {p.name for p in folder.iterdir()} == {"manifest.json", made.name} and made.read_bytes() == before


# -------------------------------------------------------------------------------------------------- nothing that is NaN

def spoil(exp) -> None:
    for path in (exp / "logs" / "digits").glob("*.pth"):
        state = torch.load(path, weights_only=True)
        for weights in ([state["model"], state["ema"]] if "model" in state else [state]):
            weights["conv_in.bias"].fill_(math.nan)
        state.pop("digests", None)
        torch.save(dict(state), path)


@pytest.mark.parametrize("save", ["png", "npz"])
def test_weights_that_are_not_finite_end_with_4_and_name_the_seeds(run, tmp_path, capsys, save):
    spoil(tmp_path)
    assert run("--seeds", "3,7", "--save", save) == 4
    error = capsys.readouterr().err
    assert "not finite for 2 image(s), seeds 3, 7" in error and "Traceback" not in error
    assert not list((tmp_path / "image_samples").rglob("*.png")) + list((tmp_path / "image_samples").rglob("*.npz"))


def test_so_they_do_on_two_ranks(run, tmp_path):
    spoil(tmp_path)
    ranks = jobs.ranks("generate", ["--exp", str(tmp_path), "--doc", "digits", "--device", "cpu", "--no-fid",
                                    "--timesteps", "1", "--num_samples", "4", "--batch_size", "2", "--grid", "0"])
    assert [rank.wait() for rank in ranks] == [4, 4], [rank.text for rank in ranks]
    assert any("seeds 0, 1" in rank.text or "seeds 2, 3" in rank.text for rank in ranks)
    assert not any("Traceback" in rank.text for rank in ranks)


@pytest.mark.parametrize("churn", ["10,0,inf,inf", "10,0,50,nan"])
def test_churn_that_is_not_finite_is_refused(run, tmp_path, capsys, churn):
    assert run("--num_samples", "1", "--sample_type", "heun", "--churn", churn) == 2
    error = capsys.readouterr().err
    assert "--churn" in error and error.count("\n") == 1 and not (tmp_path / "image_samples").exists()
