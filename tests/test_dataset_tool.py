import json
import subprocess
import sys
import zipfile
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

import dataset_tool
from dataset_tool import main
from datasets import images, labels, tool
from datasets.convert import FORMATS
from datasets.files import ImageFiles

REPOSITORY = Path(__file__).parents[1]
ZIP = ["--data.dataset", "ZIP", "--data.num_workers", "0"]


@pytest.fixture
def pixels():
    return np.random.RandomState(3).randint(0, 256, (5, 12, 8, 3), np.uint8)


@pytest.fixture
def source(tmp_path, pixels):
    """A labelled tree of five 12x8 images."""
    folder = tmp_path / "source"
    for i, image in enumerate(pixels):
        (folder / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i % 2}/{i}.png")
    names = [f"{i % 2}/{i}.png" for i in range(5)]
    (folder / "dataset.json").write_text(json.dumps({"labels": [[name, i] for i, name in enumerate(names)]}))
    return folder


ORDER = [0, 2, 4, 1, 3]                                                  # 0/0 0/2 0/4 1/1 1/3


def convert(*args):
    return main(["convert", *map(str, args), "--workers", "0"])


@pytest.mark.parametrize("name", ["made.zip", "made"])
def test_zip_and_folder_round_trip_without_loss(source, tmp_path, pixels, name):
    assert convert("--source", source, "--dest", tmp_path / name) == 0
    files = ImageFiles(tmp_path / name)
    assert files.names[:2] == ["00000/img00000000.png", "00000/img00000001.png"]
    assert files.labels.tolist() == ORDER
    for i, k in enumerate(ORDER):
        np.testing.assert_array_equal(files.read(i), pixels[k])
    if name == "made.zip":
        with zipfile.ZipFile(tmp_path / name) as archive:
            assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert convert("--source", tmp_path / name, "--dest", tmp_path / "again.zip") == 0
        assert (tmp_path / "again.zip").read_bytes() == (tmp_path / name).read_bytes()


def test_lmdb_and_npy(source, tmp_path, pixels):
    assert convert("--source", source, "--dest", tmp_path / "made.npy") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "made.npy"), pixels[ORDER])
    assert convert("--source", tmp_path / "made.npy", "--dest", tmp_path / "train.lmdb", "--resolution", "8x8") == 0
    with lmdb.open(str(tmp_path / "train.lmdb"), readonly=True) as environment:
        assert environment.stat()["entries"] == 5
    assert main(["verify", "--config", "celebahq.yml", "--data.root", str(tmp_path), "--data.image_size", "32"]) == 0


def test_edm_call_without_subcommand_resamples_with_lanczos(source, tmp_path, pixels):
    assert main([f"--source={source}", f"--dest={tmp_path / 'made.zip'}", "--resolution=4x6"]) == 0
    expected = Image.fromarray(pixels[0]).resize((4, 6), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(ImageFiles(tmp_path / "made.zip").read(0), np.array(expected))
    assert main(["--resolution=4x6", "--max-images", "1", "--source", str(source), f"--dest={tmp_path / 'm.npy'}"]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "m.npy"), np.array(expected)[None])


@pytest.mark.parametrize("transform", ["center-crop", "center-crop-wide", "celeba"])
def test_transforms(tmp_path, pixels, transform):
    rows, columns = np.mgrid[0:218, 0:178].astype(np.uint8)
    (tmp_path / "faces").mkdir()
    face = np.stack([rows, columns, rows], -1)
    Image.fromarray(face).save(tmp_path / "faces/0.png")
    size = {"center-crop": "178x178", "center-crop-wide": "178x100", "celeba": "128x128"}[transform]
    assert convert("--source", tmp_path / "faces", "--dest", tmp_path / "d", "--resolution", size,
                   "--transform", transform) == 0
    got = ImageFiles(tmp_path / "d").read(0)
    canvas = np.zeros((178, 178, 3), np.uint8)
    canvas[39:139] = face[59:159]
    expected = {"center-crop": face[20:198], "center-crop-wide": canvas, "celeba": face[57:185, 25:153]}[transform]
    np.testing.assert_array_equal(got, expected)


def test_images_that_do_not_fit_the_wide_crop_are_left_out(tmp_path, caplog):
    for i, size in enumerate([(16, 8), (8, 8), (16, 16)]):
        Image.new("RGB", size, (i, i, i)).save(tmp_path / f"{i}.png")
    assert convert("--source", tmp_path, "--dest", tmp_path / "d", "--resolution", "16x8",
                   "--transform", "center-crop-wide") == 0
    assert len(ImageFiles(tmp_path / "d")) == 2 and "left out 1 images" in caplog.text


def test_grey_stays_grey_and_alpha_is_dropped(tmp_path):
    for mode in ("L", "RGBA"):
        (tmp_path / mode).mkdir()
        Image.new(mode, (4, 4), 7).save(tmp_path / mode / "0.png")
        assert convert("--source", tmp_path / mode, "--dest", tmp_path / f"{mode}.npy") == 0
    assert np.load(tmp_path / "L.npy").shape == (1, 4, 4, 1)
    assert np.load(tmp_path / "RGBA.npy").shape == (1, 4, 4, 3)


def test_cifar10_archive_is_a_source(tmp_path, pixels):
    import io
    import pickle
    import tarfile

    rows = np.random.RandomState(0).randint(0, 256, (2, 3072), np.uint8)
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name in ("data_batch_1", "data_batch_2", "test_batch"):
            data = pickle.dumps({b"data": rows, b"labels": [3, 4]}, protocol=2)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert convert("--source", tmp_path / "cifar-10-python.tar.gz", "--dest", tmp_path / "c.zip") == 0
    files = ImageFiles(tmp_path / "c.zip")
    assert files.labels.tolist() == [3, 4, 3, 4]
    np.testing.assert_array_equal(files.read(1), rows[1].reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize(("name", "expected"), [("z.zip", "2 images, labels: 2 classes of 1 to 1 images"),
                                               ("z.lmdb", "2 images, labels: none")])
def test_what_is_said_to_be_written_is_what_is(source, tmp_path, caplog, name, expected):
    with caplog.at_level("INFO"):
        assert convert("--source", source, "--dest", tmp_path / name, "--max-images", "2") == 0
    assert expected in caplog.text


def test_jpeg_only_when_asked(source, tmp_path):
    assert convert("--source", source, "--dest", tmp_path / "j.zip", "--jpeg", "90", "--max-images", "2") == 0
    files = ImageFiles(tmp_path / "j.zip")
    assert files.names == ["00000/img00000000.jpg", "00000/img00000001.jpg"]


@pytest.mark.parametrize(("args", "code", "message"), [
    (["--transform", "center-crop"], 2, "needs --resolution"), (["--resolution", "8"], 2, "must be WxH"),
    (["--resolution", "0x8"], 2, "must be WxH"), (["--jpeg", "101"], 2, "at most 100"),
    (["--max-images", "0"], 2, "at least 1"), (["--format", "tar"], 2, "invalid choice"), (["--wrong"], 2, "unknown")])
def test_wrong_requests(source, tmp_path, capsys, args, code, message):
    assert convert("--source", source, "--dest", tmp_path / "d.zip", *args) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "d.zip").exists()


@pytest.mark.parametrize("dest", ["d.zip", "d", "d.npy", "d.lmdb"])
def test_bad_sources_leave_nothing_behind(source, tmp_path, capsys, dest):
    assert convert("--source", tmp_path / "none", "--dest", tmp_path / dest) == 3
    Image.new("RGB", (8, 9)).save(source / "1/9.png")
    (source / "dataset.json").unlink()
    assert convert("--source", source, "--dest", tmp_path / dest) == 3
    assert "1/9.png: the image is (9, 8, 3)" in capsys.readouterr().err
    (source / "1/9.png").write_bytes(b"broken")
    assert convert("--source", source, "--dest", tmp_path / dest) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nothing_is_overwritten(source, tmp_path, capsys):
    (tmp_path / "d.zip").write_text("precious")
    assert convert("--source", source, "--dest", tmp_path / "d.zip") == 2
    assert convert("--source", source, "--dest", source) == 2
    assert (tmp_path / "d.zip").read_text() == "precious" and "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "flags", "code"), [
    ("d.zip", [], 2), ("d", ["--format", "npy"], 2), ("d", [], 0), ("d.lmdb", [], 0)])
def test_an_empty_folder_is_the_place_of_a_folder_only(source, tmp_path, capsys, name, flags, code, monkeypatch):
    (tmp_path / name).mkdir()
    if code:
        monkeypatch.setattr(tool, "open_source", None)                                # refused before anything is read
    assert convert("--source", source, "--dest", tmp_path / name, *flags) == code
    assert ("exists already" in capsys.readouterr().err) == bool(code)


def test_verify(source, tmp_path, capsys):
    convert("--source", source, "--dest", tmp_path / "made.zip", "--resolution", "8x8")
    config = [*ZIP, "--data.root", str(tmp_path / "made.zip"), "--data.image_size", "8", "--exp", str(tmp_path)]
    small = ["--model.ch_mult", "[1]"]
    assert main(["verify", "--config", "cifar10.yml", *config, *small, "--full"]) == 0
    out = capsys.readouterr().out
    assert "zip: 5 images" in out and "5 classes of 1 to 1 images" in out and "pixels of all" in out
    broken = ["--data.root", str(source), "--data.dataset", "FOLDER"]
    (source / "1/3.png").write_bytes((source / "1/3.png").read_bytes()[:80])
    for full, skip, code in (("", "0", 3), ("--full", "0", 3), ("--full", "1", 0)):
        args = ["verify", "--config", "cifar10.yml", *config, *small, *broken, "--data.skip_bad", skip]
        assert main([*args, *filter(None, [full])]) == code
        assert "unreadable: " in (out := capsys.readouterr().out) and "1/3.png" in out
        assert "5 images, 1 of them unreadable (" in out
    assert not (tmp_path / "datasets").exists()                                  # verifying packs nothing


def test_info(source, capsys):
    assert main(["info", "--source", str(source)]) == 0
    assert "images    5" in (out := capsys.readouterr().out) and "12x8, 3 channel(s)" in out
    assert "sizes     of the first 5: height 12, width 8; 0 unreadable" in out


def test_info_tells_of_mixed_sizes_and_unreadable_pictures(source, capsys):
    Image.new("RGB", (30, 20)).save(source / "1/1.png")
    (source / "0/0.png").write_bytes(b"")
    assert main(["info", "--source", str(source)]) == 0
    out = capsys.readouterr().out
    assert "sizes     of the first 5: height 12 to 20, width 8 to 30; 1 unreadable" in out
    assert f"unreadable {source / '0/0.png'}: not an image file" in out


def test_info_where_nothing_of_what_it_looks_at_can_be_read(source, capsys, monkeypatch):
    monkeypatch.setattr(tool, "LOOKED_AT", 1)
    (source / "0/0.png").write_bytes(b"")
    assert main(["info", "--source", str(source)]) == 3
    error = capsys.readouterr().err
    assert "0.png" in error and error.count("\n") == 1


def test_keys_of_a_configuration_are_for_verify(source, tmp_path, capsys):
    assert main(["convert", "--source", str(source), "--dest", str(tmp_path / "o.zip"), "--data.labels", "none"]) == 2
    assert "--data.labels is a key of a configuration, which convert has none of" in capsys.readouterr().err


def test_the_choices_are_those_of_the_tables():
    assert set(dataset_tool.FORMATS) == FORMATS.keys()
    assert set(dataset_tool.RESAMPLE) == images.RESAMPLE.keys()
    assert set(dataset_tool.TRANSFORMS) == images.TRANSFORMS.keys() - {"resize", "resize-center-crop"}
    assert set(dataset_tool.LABEL_RULES) == labels.FILE_RULES.keys() - {"json"}


def test_help_and_a_real_process(tmp_path):
    for command in ([], ["convert"], ["verify"], ["info"]):
        assert main([*command, "--help"]) == 0
    done = subprocess.run([sys.executable, "dataset_tool.py", "info", "--source", tmp_path / "none"], cwd=REPOSITORY,
                          capture_output=True, text=True)
    assert done.returncode == 3 and done.stderr.startswith("dataset_tool.py: ") and done.stderr.count("\n") == 1
