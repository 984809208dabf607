"""Every item under "Bad data" of docs/data.md: one line that names the file, exit code 3, nothing half written."""

import json
import os
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import build_dataset, find_dataset, lmdb_scan
from datasets.files import ImageFiles
from datasets.packed import open_images
from utils.errors import DataError, UserError


@pytest.fixture
def refused(tmp_path):
    """``refused(config, "part of the message", ...)``: packing fails so, and leaves no pack behind."""
    def check(config, *parts, split="train"):
        with pytest.raises(DataError) as error:
            open_images(config, tmp_path, split)
        message = str(error.value)
        assert error.value.code == 3 and "\n" not in message
        assert all(part in message for part in parts), message
        left = [p.name for p in (tmp_path / ".packed").glob("*")] if (tmp_path / ".packed").exists() else []
        assert all(name.endswith(".lock") for name in left), left
    return check


@pytest.fixture
def truncated(noise, png):
    return png(noise(32, 32, 3), "JPEG")[:600]


def png_of_size(width, height):
    """A PNG that claims a size and holds next to nothing."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(b""), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items())


def test_missing_folder_shows_where_and_what(make_config, refused, tmp_path):
    refused(make_config("AFHQ", 8), "AFHQ not found", str(tmp_path / "afhq"), "expected: afhq/SUB/*")
    refused(make_config("CELEBA", 8), "img_align_celeba, list_eval_partition.txt", str(tmp_path / "celeba/celeba"))
    refused(make_config("ZIP", 8, root=tmp_path / "no.zip"), str(tmp_path / "no.zip"))
    refused(make_config("CELEBAHQ", 8, root=tmp_path / "x"), str(tmp_path / "x/celebahq"), "train.lmdb")
    for name in ("LSUN", "FFHQ", "IMAGENET32", "IMAGENET64", "FFHQ64"):
        category = {"category": "tower"} if name == "LSUN" else {}
        refused(make_config(name, 32, **category), f"{name} not found", "expected: ")
    with pytest.raises(UserError, match="FOLDER needs data.root"):
        find_dataset(make_config("FOLDER", 8), tmp_path)
    with pytest.raises(UserError, match="data.dataset 'CIFAR' is unknown; known: AFHQ, CAPTIONS, CELEBA"):
        find_dataset(make_config("CIFAR", 8), tmp_path)
    with pytest.raises(UserError, match="split 'valid' is unknown"):
        find_dataset(make_config("DIGITS", 8, 1), tmp_path, "valid")


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_empty_set(make_config, refused, write_tree, write_zip, write_lmdb, tmp_path, cache):
    refused(make_config("FOLDER", 8, root=write_tree({"a.txt": b""}), cache=cache), "holds no images")
    refused(make_config("ZIP", 8, root=write_zip({"a.txt": ""}), cache=cache), "holds no images")
    refused(make_config("FOLDER", 8, root=write_lmdb({}, "l"), cache=cache), "holds no images")
    np.savez(tmp_path / "e.npz", np.zeros((0, 8, 8, 3), np.uint8))
    refused(make_config("FOLDER", 8, root=tmp_path / "e.npz", cache=cache), "holds no images")


def test_wrong_channel_count(make_config, refused, noise, write_zip, write_lmdb, tmp_path):
    grey, colour = write_zip({"0.png": noise(8, 8, 1)}, "grey.zip"), write_zip({"0.png": noise(8, 8, 3)}, "rgb.zip")
    refused(make_config("ZIP", 8, root=grey), "grey.zip/0.png", "1 channel(s), data.channels is 3")
    refused(make_config("ZIP", 8, 1, root=colour), "rgb.zip/0.png", "3 channel(s), data.channels is 1")
    np.savez(tmp_path / "set.npz", noise(2, 8, 8, 4))
    refused(make_config("FOLDER", 8, root=tmp_path / "set.npz"), "set.npz", "4 channel(s)")
    write_lmdb({"0": noise(8, 8, 3).tobytes()}, "celebahq/train.lmdb")
    refused(make_config("CELEBAHQ", 8, 1), "raw RGB", "data.channels is 1")
    refused(make_config("DIGITS", 8, 3), "1 channel(s), data.channels is 3")


def test_images_without_pixels(make_config, refused, write_tree, tmp_path):
    np.savez(tmp_path / "set.npz", np.zeros((2, 0, 8, 3), np.uint8))
    refused(make_config("FOLDER", 8, root=tmp_path / "set.npz"), "set.npz", "empty images")
    refused(make_config("FOLDER", 8, root=write_tree({"flat.png": png_of_size(4, 0)})), "flat.png")


def test_mixed_sizes_where_sizes_must_agree(make_config, refused, noise, write_zip, tmp_path):
    path = write_zip({"0.png": noise(8, 8, 3), "1.png": noise(8, 9, 3)})
    refused(make_config("ZIP", 8, root=path), "1.png", "the image is 8x9", "asks for 8x8", "dataset_tool.py convert")
    folder = tmp_path / "imagenet32"
    folder.mkdir()
    np.savez(folder / "train_data_batch_1.npz", data=noise(2, 3 * 64 * 64))
    refused(make_config("IMAGENET32", 32), "train_data_batch_1.npz", "3x32x32", "(n, 3072)")


def test_truncated_jpeg_among_good_ones(make_config, refused, noise, write_tree, truncated, tmp_path, caplog):
    good = noise(32, 32, 3)
    tree = write_tree({"0.png": good, "1.jpg": truncated, "2.jpg": b"no image", "3.png": 255 - good})
    refused(make_config("FOLDER", 32, root=tree, skip_bad=0), "1.jpg", "truncated", "data.skip_bad")
    refused(make_config("FOLDER", 32, root=tree, skip_bad=1), "data.skip_bad allows 1")
    config = make_config("FOLDER", 32, root=tree, skip_bad=2)
    for _ in range(2):                                                        # listed again when the pack is reused
        caplog.clear()
        store = open_images(config, tmp_path)
        assert "1.jpg" in caplog.text and "2.jpg" in caplog.text
        images = next(store.batches([torch.arange(2)]))
        np.testing.assert_array_equal(images.permute(0, 2, 3, 1), np.stack([good, 255 - good]))
    with pytest.raises(DataError, match="1.jpg"):                             # the pack made with 2 is not good for 0
        open_images(make_config("FOLDER", 32, root=tree), tmp_path)
    with pytest.raises(DataError, match="1.jpg: unreadable image"):
        build_dataset(config, tmp_path)[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_without_a_pack(make_config, noise, write_tree, truncated, tmp_path, workers):
    pixels = noise(3, 32, 32, 3)
    tree = write_tree({"0.png": pixels[0], "1.jpg": truncated, "2.png": pixels[2]})
    data = {"root": tree, "cache": "off", "num_workers": workers}
    with pytest.raises(DataError, match="1.jpg") as error:
        list(open_images(make_config("FOLDER", 32, **data), tmp_path).batches([torch.tensor([0, 1])]))
    assert "\n" not in str(error.value)
    store = open_images(make_config("FOLDER", 32, skip_bad=1, **data), tmp_path)
    got, = store.batches([torch.tensor([0, 1, 2])])
    np.testing.assert_array_equal(got.permute(0, 2, 3, 1), pixels[[0, 2, 2]])


def test_an_unreadable_image_is_replaced_by_one_of_its_class(make_config, noise, write_tree, truncated, tmp_path):
    """So that its label stays true: not by 2.png of b/, which follows, but by 0.png of a/."""
    pixels = noise(3, 32, 32, 3)
    tree = write_tree({"a/0.png": pixels[0], "a/1.jpg": truncated, "b/2.png": pixels[2]})
    store = open_images(make_config("FOLDER", 32, root=tree, cache="off", num_workers=0, skip_bad=1), tmp_path)
    got, = store.batches([torch.tensor([1])])
    np.testing.assert_array_equal(got[0].permute(1, 2, 0), pixels[0])


def test_nothing_but_bad_images(make_config, refused, write_tree, truncated):
    refused(make_config("FOLDER", 8, root=write_tree({"1.jpg": truncated}), skip_bad=5), "every image", "unreadable")


def test_more_than_eight_bits(make_config, refused, tmp_path):
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(tmp_path / "deep.png")
    refused(make_config("FOLDER", 8, 1, root=tmp_path), "deep.png", "more than 8 bits")


def test_wrong_lmdb_record_length(make_config, refused, noise, write_lmdb):
    write_lmdb({"0": noise(8, 8, 3).tobytes(), "1": b"short"}, "celebahq/train.lmdb")
    refused(make_config("CELEBAHQ", 8), "train.lmdb, key 1", "wrong record length: 5 bytes, the others have 192")
    write_lmdb({"0": b"seven b"}, "celebahq/validation.lmdb")
    refused(make_config("CELEBAHQ", 8), "validation.lmdb, key 0", "(7 bytes)", split="test")


def test_a_slow_disk_is_not_a_damaged_lmdb(monkeypatch, write_lmdb):
    """The time that may pass is that of some entries, however many there are."""
    path, alarms = write_lmdb({f"{i:02}": b"x" for i in range(25)}, "l"), []
    monkeypatch.setattr(lmdb_scan, "AT_ONCE", 10)
    monkeypatch.setattr(lmdb_scan.signal, "alarm", alarms.append)
    assert len(lmdb_scan._walk(path, path / "data.mdb")[1]) == 25
    assert alarms == [lmdb_scan.PATIENCE] * 3


def test_lmdb_with_gaps_or_truncated(make_config, refused, noise, png, write_lmdb):
    write_lmdb({"0": png(noise(8, 8, 3)), "2": png(noise(8, 8, 3))}, "celebahq/train.lmdb")
    refused(make_config("CELEBAHQ", 8), "train.lmdb", "key 1 is missing")
    write_lmdb({"8-00000": png(noise(8, 8, 3)), "length": b"2"}, "FFHQ")
    refused(make_config("FFHQ", 8), "key 8-00001: missing")
    path = write_lmdb({str(i): noise(64, 64, 3).tobytes() for i in range(4)}, "celebahq/validation.lmdb")
    os.truncate(path / "data.mdb", 20_000)
    refused(make_config("CELEBAHQ", 64), "data.mdb", "truncated", split="test")
    (path / "data.mdb").write_bytes(b"not an LMDB" * 1000)
    refused(make_config("CELEBAHQ", 64), "validation.lmdb", "not a usable LMDB", split="test")


def test_npz_with_a_missing_key_or_a_pickle(make_config, refused, noise, tmp_path):
    folder = tmp_path / "imagenet32"
    folder.mkdir()
    np.savez(folder / "train_data_batch_1.npz", pixels=noise(2, 3072))
    refused(make_config("IMAGENET32", 32), "train_data_batch_1.npz", "no array 'data', only pixels")
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "evil.npz", arr_0=np.array([object()], dtype=object))
        refused(make_config("FOLDER", 8, root=tmp_path / "evil.npz"), "evil.npz", "'arr_0' cannot be read")
    np.savez(folder / "train_data_batch_3.npz", data=noise(2, 3072))
    refused(make_config("IMAGENET32", 32), "[1, 3]", "without a gap")
    (tmp_path / "cut.npz").write_bytes((folder / "train_data_batch_3.npz").read_bytes()[:-100])
    refused(make_config("FOLDER", 8, root=tmp_path / "cut.npz"), "cut.npz", "not a usable zip archive")
    np.savez(tmp_path / "float.npz", np.zeros((2, 8, 8, 3)))
    refused(make_config("FOLDER", 8, root=tmp_path / "float.npz"), "float.npz", "uint8", "float64")


@pytest.mark.parametrize("name", ["../x.png", "/abs.png", "a/../../x.png", "..\\x.png", "C:\\x.png"])
def test_zip_whose_names_leave_the_folder(make_config, refused, noise, write_zip, name):
    path = write_zip({"0.png": noise(8, 8, 3), name: noise(8, 8, 3)})
    refused(make_config("ZIP", 8, root=path), "set.zip", "refused", "leaves its folder")


def test_broken_zip(make_config, refused, noise, write_zip, tmp_path):
    path = write_zip({"0.png": noise(8, 8, 3)})
    (tmp_path / "cut.zip").write_bytes(path.read_bytes()[:-30])
    refused(make_config("ZIP", 8, root=tmp_path / "cut.zip"), "cut.zip", "not a usable zip")
    flipped = bytearray(path.read_bytes())
    flipped[100] ^= 255
    (tmp_path / "crc.zip").write_bytes(flipped)
    refused(make_config("ZIP", 8, root=tmp_path / "crc.zip"), "crc.zip/0.png", "CRC")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            archive.writestr("0.png", b"x")
    refused(make_config("ZIP", 8, root=tmp_path / "two.zip"), "two.zip", "same name")


@pytest.mark.parametrize(("labels", "message"), [
    ([["0.png", 1]], "has no label for 1.png"), ([["0.png", 1], ["1.png", 1], ["2.png", 1]], "not there, 2.png"),
    ({"0.png": 1}, 'must be {"labels"'), (3, "must be"), ([["0.png"]], "must be")])
def test_labels_that_do_not_match_the_files(make_config, refused, noise, write_zip, labels, message):
    path = write_zip({"0.png": noise(8, 8, 3), "1.png": noise(8, 8, 3), "dataset.json": json.dumps({"labels": labels})})
    refused(make_config("ZIP", 8, root=path), "set.zip/dataset.json", message)


def test_partition_and_label_counts_that_do_not_match(make_config, refused, noise, write_tree, tmp_path):
    tree = write_tree({"img_align_celeba/000001.jpg": noise(218, 178, 3),
                       "list_eval_partition.txt": b"000001.jpg 0\n000002.jpg 0\n"}, "celeba")
    refused(make_config("CELEBA", 64), "list_eval_partition.txt", "names 000002.jpg")
    (tree / "list_eval_partition.txt").write_bytes(b"000001.jpg\n")
    refused(make_config("CELEBA", 64), "list_eval_partition.txt", "lines like")
    (tree / "list_eval_partition.txt").write_bytes(b"000001.jpg 0\n")
    (tree / "img_align_celeba/000001.jpg").write_bytes((write_tree({"s.png": noise(64, 64, 3)}) / "s.png").read_bytes())
    refused(make_config("CELEBA", 64), "000001.jpg", "at least 185x153")
    np.savez(tmp_path / "l.npz", noise(2, 8, 8, 3), np.arange(3))
    refused(make_config("FOLDER", 8, root=tmp_path / "l.npz"), "l.npz", "3 labels for 2 images")


def test_decompression_bomb(make_config, refused, write_tree, monkeypatch):
    tree = write_tree({"bomb.png": png_of_size(60_000, 60_000)})
    refused(make_config("FOLDER", 8, root=tree), "bomb.png", "decompression bomb")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)                          # between PIL's warning and its error
    tree = write_tree({"big.png": np.zeros((8, 8, 3), np.uint8)}, "big")
    refused(make_config("FOLDER", 8, root=tree), "big.png", "decompression bomb")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_malicious_cifar_batch_does_not_run(make_config, refused, tmp_path):
    folder = tmp_path / "cifar10/cifar-10-batches-py"
    folder.mkdir(parents=True)
    for i in range(1, 6):
        (folder / f"data_batch_{i}").write_bytes(pickle.dumps({b"data": Payload(tmp_path / "owned"), b"labels": []}))
    refused(make_config("CIFAR10", 32), "data_batch_1", "asks for posix.mkdir")
    assert not (tmp_path / "owned").exists()
    (folder / "data_batch_1").write_bytes(pickle.dumps([1, 2]))
    refused(make_config("CIFAR10", 32), "data_batch_1", "not a CIFAR-10 batch")


def test_other_programs_formats_are_not_opened(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")  # PIL would start programs
    with pytest.raises(DataError, match="x.png: unreadable image: not an image file"):
        ImageFiles(tmp_path).read(0)


def test_links_in_a_circle_are_listed_once(noise, write_tree):
    tree = write_tree({"a/0.png": noise(4, 4, 3), "b/1.png": noise(4, 4, 3), "b/notes.txt": b""})
    (tree / "a/loop").symlink_to(tree)
    (tree / "c").symlink_to(tree / "b")
    files = ImageFiles(tree)
    assert len(files) == 2 and files.ignored == 1


def test_disk_full_while_packing(make_config, noise, write_tree, tmp_path):
    import resource
    import signal

    config = make_config("FOLDER", 8, root=write_tree({f"{i}.png": noise(8, 8, 3) for i in range(100)}))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(DataError, match="no room for a pack"):
            open_images(config, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in (tmp_path / ".packed").iterdir()] == ["folder.lock"]
    assert open_images(config, tmp_path).num_images == 100


@pytest.mark.parametrize(("offset", "message"), [(6, "not a usable zip archive: zip file version 9.9"),
                                                 (10, "unreadable in the archive: ")])
def test_a_zip_of_the_future(noise, write_zip, make_config, refused, offset, message):
    """Another format version, another compression method: zipfile raises NotImplementedError for both."""
    path = write_zip({f"{i}.png": image for i, image in enumerate(noise(3, 8, 8, 3))})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + offset] = 99
    path.write_bytes(content)
    refused(make_config("ZIP", 8, root=path), path.name, message)
