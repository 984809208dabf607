"""``dataset_tool.py verify`` on every format, with images that are not square or do not lie in memory as they are read;
and ``convert`` on what newcomers have: photographs, damaged ones among them, folders as classes."""

import io
import json
import os
import pickle
import signal
import zipfile
from functools import partial

import lmdb
import numpy as np
import pytest
from PIL import Image

from dataset_tool import main
from datasets.files import ImageFiles
from tests.faults import jobs

NOISE = np.random.RandomState(7).randint(0, 256, (4, 48, 80, 3), np.uint8)
SHAPE = ["--data.image_size", "[24,40]", "--model.ch_mult", "[1]", "--model.attn_resolutions", "[]",
         "--data.num_workers", "0"]


def encoded(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write_lmdb(records, path):
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
        for key, value in records.items():
            transaction.put(key.encode(), value)


def cifar(tmp):
    (tmp / "cifar10/cifar-10-batches-py").mkdir(parents=True)
    rows = np.random.RandomState(0).randint(0, 256, (4, 3072), np.uint8)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (tmp / "cifar10/cifar-10-batches-py" / name).write_bytes(pickle.dumps({b"data": rows, b"labels": [0] * 4}, 2))
    return ["--data.dataset", "CIFAR10", "--data.image_size", "32"]


def imagenet(tmp):
    (tmp / "imagenet32").mkdir()
    for name in ("train_data_batch_1", "val_data"):
        np.savez(tmp / "imagenet32" / name, data=np.zeros((4, 3 * 32 * 32), np.uint8), labels=np.arange(1, 5))
    return ["--data.dataset", "IMAGENET32", "--data.image_size", "32"]


def tree(name, folder):
    def make(tmp):
        (tmp / folder).mkdir()
        for i, image in enumerate(NOISE):
            Image.fromarray(image).save(tmp / folder / f"{i}.png")
        return ["--data.dataset", name, *(["--data.root", str(tmp / folder)] if name == "FOLDER" else [])]
    return make


def lmdb_of(name, folder, keys, test=None, **flags):
    def make(tmp):
        images = NOISE[:, :24, :40] if name == "FFHQ" else NOISE
        records = {key: encoded(image) for key, image in zip(keys, images, strict=True)}
        for path in filter(None, (folder, test)):
            write_lmdb(records | ({"length": b"4"} if name == "FFHQ" else {}), tmp / path)
        return ["--data.dataset", name, *(word for key, value in flags.items() for word in (f"--data.{key}", value))]
    return make


def celeba(tmp):
    (tmp / "celeba/img_align_celeba").mkdir(parents=True)
    for i in (1, 2):
        Image.fromarray(np.tile(NOISE[i], (5, 3, 1))[:218, :178]).save(tmp / f"celeba/img_align_celeba/00000{i}.jpg")
    (tmp / "celeba/list_eval_partition.txt").write_text("000001.jpg 0\n000002.jpg 2\n")
    return ["--data.dataset", "CELEBA"]


def array(save, name):
    def make(tmp):
        transposed = np.ascontiguousarray(NOISE[:, :40, :24].transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
        save(tmp / name, transposed.transpose(0, 2, 1, 3))                              # Fortran's order, or a view's
        return ["--data.dataset", "FOLDER", "--data.root", str(tmp / name)]
    return make


def digits(tmp):
    return ["--data.dataset", "DIGITS", "--data.channels", "1", "--model.in_channels", "1", "--model.out_ch", "1",
            "--data.image_size", "[8,16]"]


def zipped(tmp):
    with zipfile.ZipFile(tmp / "x.zip", "w") as archive:
        for i, image in enumerate(NOISE):
            archive.writestr(f"{i}.png", encoded(image[:24, :40]))
    return ["--data.dataset", "ZIP", "--data.root", str(tmp / "x.zip")]


FORMATS = {
    "CIFAR10": cifar, "IMAGENET32": imagenet, "FFHQ64": tree("FFHQ64", "ffhq64"), "AFHQ": tree("AFHQ", "afhq"),
    "FOLDER": tree("FOLDER", "photos"), "ZIP": zipped, "CELEBA": celeba, "DIGITS": digits,
    "CELEBAHQ": lmdb_of("CELEBAHQ", "celebahq/train.lmdb", "0123"),
    "LSUN": lmdb_of("LSUN", "lsun/tower_train_lmdb", "abcd", "lsun/tower_val_lmdb", category="tower"),
    "FFHQ": lmdb_of("FFHQ", "FFHQ", [f"24-0000{i}" for i in range(4)]),
    "npz": array(np.savez, "x.npz"), "npz, compressed": array(np.savez_compressed, "x.npz"),
    "npy": array(np.save, "x.npy"),
}


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_verify_every_format(tmp_path, capsys, name, full):
    (tmp_path / "datasets").mkdir()
    flags = FORMATS[name](tmp_path / "datasets")
    argv = ["verify", "--config", "cifar10.yml", "--exp", str(tmp_path), *SHAPE, *flags, *(["--full"] if full else [])]
    assert main(argv) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert " images (" in out and "sha256" in out


# ------------------------------------------------------------------------------------------------------ own photographs

def convert(*args):
    return main(["convert", *map(str, args), "--workers", "0"])


@pytest.fixture
def photos(tmp_path):
    """Two folders of photographs, of which the second of each is damaged, and one lies on its side."""
    for i, image in enumerate(NOISE):
        path = tmp_path / "photos" / "ab"[i // 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image) if i % 2 == 0 else b"broken")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(NOISE[0]).save(tmp_path / "photos/a/0.png", exif=exif)
    return tmp_path / "photos"


def test_convert_skips_damaged_pictures_on_request(photos, tmp_path, capsys, caplog):
    for skip, message in ((0, "give --skip_bad N"), (1, "--skip_bad allows 1")):
        assert convert("--source", photos, "--dest", tmp_path / "d.zip", "--skip_bad", skip, "--resolution", "8x8") == 3
        assert message in (error := capsys.readouterr().err) and "1.png: unreadable image" in error
        assert not (tmp_path / "d.zip").exists()
    assert convert("--source", photos, "--dest", tmp_path / "d.zip", "--skip_bad", 2, "--resolution", "40x24") == 0
    files = ImageFiles(tmp_path / "d.zip")
    assert len(files) == 2 and files.labels.tolist() == [0, 1]
    assert "a/1.png" in caplog.text and "b/3.png" in caplog.text
    upright = Image.fromarray(np.ascontiguousarray(NOISE[0][::-1].transpose(1, 0, 2)))
    np.testing.assert_array_equal(files.read(0), np.array(upright.resize((40, 24), Image.Resampling.LANCZOS)))


def test_the_first_picture_may_be_the_damaged_one(tmp_path, capsys):
    (tmp_path / "0.png").write_bytes(b"broken")
    (tmp_path / "1.png").write_bytes(encoded(NOISE[1]))
    assert convert("--source", tmp_path, "--dest", tmp_path / "d", "--skip_bad", 0) == 3
    assert "1 unreadable so far" in capsys.readouterr().err
    assert convert("--source", tmp_path, "--dest", tmp_path / "d", "--skip_bad", 1) == 0
    assert len(ImageFiles(tmp_path / "d")) == 1


@pytest.mark.parametrize(("rule", "labels"), [("auto", [0, 1]), ("folders", [0, 1]), ("none", None)])
def test_convert_takes_folders_as_classes(photos, tmp_path, rule, labels):
    for i in (1, 3):
        (photos / "ab"[i // 2] / f"{i}.png").unlink()
    assert convert("--source", photos, "--dest", tmp_path / "d", "--labels", rule, "--resolution", "8x8") == 0
    stored = json.loads((tmp_path / "d/dataset.json").read_text())["labels"]
    assert (stored and [label for _, label in stored]) == labels


def test_vectors_are_carried(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/0.png").write_bytes(encoded(NOISE[0]))
    (tmp_path / "s/dataset.json").write_text(json.dumps({"labels": [["0.png", [0.5, -1.0]]]}))
    assert convert("--source", tmp_path / "s", "--dest", tmp_path / "d.zip") == 0
    assert ImageFiles(tmp_path / "d.zip").labels.tolist() == [[0.5, -1.0]]


def test_a_folder_without_pictures_says_what_is_there(tmp_path, capsys):
    for name in ("a.mov", "b.mov", "notes.txt", "raw"):
        (tmp_path / name).write_bytes(b"")
    assert convert("--source", tmp_path, "--dest", tmp_path / "d") == 3
    error = capsys.readouterr().err
    assert f"holds no images: {tmp_path} has 2 x .mov, 1 x .txt, 1 x no ending; images end in .png" in error


@pytest.mark.parametrize(("name", "signum", "code", "line"), [
    *((name, signal.SIGKILL, -9, "") for name in ("d.zip", "d", "d.npy", "d.lmdb")),
    ("d.zip", signal.SIGTERM, 143, "dataset_tool.py: stopped by SIGTERM"), ("d", signal.SIGINT, 130, "by SIGINT")])
def test_an_ended_conversion_leaves_neither_workers_nor_files(tmp_path, name, signum, code, line):
    """Nothing but the program itself cleans up."""
    (tmp_path / "source").mkdir()
    content = encoded(NOISE[0].repeat(8, 0).repeat(8, 1))
    for i in range(3000):                                      # seconds of work: a busy machine is late
        (tmp_path / f"source/{i}.png").write_bytes(content)
    (tmp_path / "made").mkdir()
    job = jobs.Job("dataset_tool", ["convert", "--source", str(tmp_path / "source"), "--dest",
                                    str(tmp_path / "made" / name), "--workers", "2"])
    jobs.wait_until(lambda: len(jobs.children(job.process.pid)) >= 3)          # two workers, and who cleans up
    jobs.wait_until(lambda: any((tmp_path / "made").iterdir()))
    started = jobs.children(job.process.pid)
    os.kill(job.process.pid, signum)
    assert job.wait() == code and line in job.text and "Traceback" not in job.text
    jobs.wait_until(lambda: not any(jobs.alive(pid) for pid in started))
    assert list((tmp_path / "made").iterdir()) == []


def test_a_full_disk_under_an_lmdb_is_one_line(photos, tmp_path):
    """As a process, because the limit that stands for a full disk holds for whatever it writes."""
    job = jobs.Job("dataset_tool", ["convert", "--source", str(photos), "--dest", str(tmp_path / "d.lmdb"),
                                    "--skip_bad", "2", "--resolution", "64x64"],
                   faults=[partial(jobs.limit_files, 20_000)])
    assert job.wait() == 3 and "d.lmdb: cannot be written" in job.text.splitlines()[-1], job.text
    assert not list(tmp_path.glob("*.lmdb")) and not list(tmp_path.glob(".d*"))
