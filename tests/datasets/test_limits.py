"""Files that would fill the memory or never end: refused within their folder's limits, which the message names."""

import copy
import io
import json
import os
import re
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import Config
from datasets import build_dataset, images, open_dataset, tool
from datasets.images import UnreadableImage, decode
from datasets.lmdbs import LmdbImages, any_keys
from datasets.packed import open_images
from tests.faults import jobs
from utils.errors import DataError, UserError


def refused(config, root, *parts):
    with pytest.raises(DataError) as error:
        store = open_images(config, root)
        list(store.batches([torch.arange(store.num_images)]))
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


def bomb_member(path, name, size):
    """A zip whose only member unpacks to ``size`` zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w", force_zip64=True) as file:
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))


# ------------------------------------------------------------------ in a process of its own, so that memory is measured

def peak() -> int:
    """Largest resident memory of this process so far, in kB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(sets) -> None:
    for name, root in sets:
        before = peak()
        data = {"dataset": name, "image_size": 8, "root": str(root), "num_workers": 0}
        try:
            found = open_dataset(Config(data=data, model={"ch": 32, "ch_mult": (1,)}))
            _ = found.labels, found.fingerprint, found.read(0)
            print("no error")
        except DataError as error:
            print(error)
        print(peak() - before)


def npz_claim(path, shape, compressed=True):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"shape": shape, "fortran_order": False, "descr": "|u1"})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(1000))


def make_bombs(folder, png, noise):
    bomb_member(folder / "image.zip", "0.png", 140 << 20)
    bomb_member(folder / "labels.zip", "dataset.json", 140 << 20)
    with zipfile.ZipFile(folder / "labels.zip", "a") as archive:
        archive.writestr("0.png", png(noise(8, 8, 3)))
    bomb_member(folder / "array.npz", "arr_0.npy", 140 << 20)
    npz_claim(folder / "claim.npz", (80 << 40,))
    npz_claim(folder / "stored.npz", (80 << 40,), compressed=False)
    np.lib.format.open_memmap(folder / "claim.npy", "w+", np.uint8, (1, 8, 8, 3)).flush()
    content = bytearray((folder / "claim.npy").read_bytes())
    content[:128] = content[:128].replace(b"(1, 8, 8, 3)", b"(9" + b"9" * 8 + b", 8, 8, 3)")[:127] + b"\n"
    (folder / "claim.npy").write_bytes(content)
    (folder / "zero").mkdir()
    (folder / "zero/0.png").symlink_to("/dev/zero")
    (folder / "pipe").mkdir()
    os.mkfifo(folder / "pipe/0.png")
    (folder / "huge").mkdir()
    with open(folder / "huge/0.png", "wb") as file:
        file.truncate(129 << 20)
    (folder / "line").mkdir()
    with open(folder / "line/metadata.jsonl", "wb") as file:
        file.truncate(300 << 20)


BOMBS = [("ZIP", "image.zip", "0.png: unpacks to 140.0 MiB: a picture may have 128 MiB at most"),
         ("ZIP", "labels.zip", "dataset.json: unpacks to 140.0 MiB"),
         ("FOLDER", "array.npz", "arrays that shrink more than 100 times are refused"),
         ("FOLDER", "claim.npz", "it claims 87,960,930,222,080 bytes and has"),
         ("FOLDER", "stored.npz", "it claims 87,960,930,222,080 bytes and has"),
         ("FOLDER", "claim.npy", "not a usable npy file"), ("FOLDER", "zero", "0.png: is not a file"),
         ("FOLDER", "pipe", "0.png: is not a file"),
         ("FOLDER", "huge", "129.0 MiB: a picture may have 128 MiB at most"),
         ("CAPTIONS", "line", "metadata.jsonl, line 1: must be")]


def test_bombs_take_neither_memory_nor_time(tmp_path, png, noise):
    make_bombs(tmp_path, png, noise)
    job = jobs.Job(measure, [[(kind, tmp_path / name) for kind, name, _ in BOMBS]])
    assert job.wait() == 0, job.text
    lines = job.text.splitlines()
    for (_, name, message), told, grown in zip(BOMBS, lines[::2], lines[1::2], strict=True):
        assert message in told, (name, told)
        assert int(grown) < 200_000, name                                            # kB


def test_lmdb_that_claims_or_leads_too_far(make_config, noise, png, write_lmdb, tmp_path):
    write_lmdb({"8-00000": png(noise(8, 8, 3)), "length": b"300000000"}, "FFHQ")
    refused(make_config("FFHQ", 8), tmp_path, "'length' says 300,000,000, but there are 2 keys")
    shutil.rmtree(tmp_path / "FFHQ")
    write_lmdb({"8-00000": png(noise(8, 8, 3)), "length": b"1" * 60_000}, "FFHQ")
    refused(make_config("FFHQ", 8), tmp_path, "the key 'length' is not a number")


def test_a_damaged_lmdb_kills_nobody(make_config, noise, write_lmdb, tmp_path):
    """Every number in the pages of a small tree is made enormous in turn."""
    path = write_lmdb({str(i): noise(32, 32, 3).tobytes() for i in range(40)}, "celebahq/train.lmdb")
    whole, problems = (path / "data.mdb").read_bytes(), set()
    for page in range(2, len(whole) // 4096):
        for at in (10, 12, 14, 16, 20, 24):                # flags, bounds and offsets in the header of a page
            damaged = bytearray(whole)
            damaged[4096 * page + at:4096 * page + at + 2] = b"\xff\x7f"
            (path / "data.mdb").write_bytes(damaged)
            try:
                reader = LmdbImages(path, 3, any_keys)
                for i in range(len(reader)):
                    reader.read(i)
            except DataError as error:
                problems.add(str(error).partition(": ")[2][:40])
        if page > 6:
            break
    assert len(problems) > 1, problems


@pytest.mark.parametrize("size", [2**28, 100_000])
def test_a_value_that_leaves_the_file(noise, write_lmdb, tmp_path, size):
    """The length of one value, in the header of its entry, is more than the file has behind it."""
    path = write_lmdb({str(i): noise(32, 32, 3).tobytes() for i in range(40)}, "x") / "data.mdb"
    entry, whole = struct.pack("<IHH", 3072, 1, 2) + b"39", path.read_bytes()     # length, flags, key
    assert entry in whole and len(whole) > size or size == 2**28
    path.write_bytes(whole.replace(entry, struct.pack("<I", size) + entry[4:]))
    with pytest.raises(DataError, match="damaged: (the value of b'39' is|following its index leads out)"):
        LmdbImages(path.parent, 3, any_keys).read(0)


def test_lmdb_keys_of_any_bytes(noise, png, tmp_path):
    import lmdb

    keys = [b"\0", b"a", b"a\0", b"a\0\0", b"\xff\xfe", b"b" * 500]
    (tmp_path / "l").mkdir()
    with lmdb.open(str(tmp_path / "l"), map_size=1 << 22) as environment, environment.begin(write=True) as put:
        for i, key in enumerate(keys):
            put.put(key, png(np.full((4, 4, 3), i, np.uint8)))
    reader = LmdbImages(tmp_path / "l", 3, any_keys)
    assert [reader.keys[i] for i in range(len(reader))] == sorted(keys)
    for i, key in enumerate(sorted(keys)):
        assert (reader.read(i) == keys.index(key)).all()
    assert copy.deepcopy(reader).keys[2] == sorted(keys)[2]                          # as a spawned worker gets it


# ---------------------------------------------------------------------------------------------------- damage, odd names

@pytest.mark.parametrize("skip_bad", [0, 1])
def test_deflate_damage(make_config, noise, png, tmp_path, skip_bad):
    with zipfile.ZipFile(tmp_path / "d.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i, image in enumerate(noise(2, 8, 8, 3)):
            archive.writestr(f"{i}.bmp", png(image, "BMP"))
    content = bytearray((tmp_path / "d.zip").read_bytes())
    content[40:60] = b"\xff" * 20                                            # zlib.error, before any checksum
    (tmp_path / "d.zip").write_bytes(content)
    config = make_config("ZIP", 8, root=tmp_path / "d.zip", skip_bad=skip_bad)
    if skip_bad:
        assert open_images(config, tmp_path).num_images == 1
    else:
        refused(config, tmp_path, "0.bmp: unreadable in the archive")


def test_a_member_without_a_name(make_config, noise, write_zip, tmp_path):
    path = write_zip({"0.png": noise(4, 4, 3), "x": b"text"})
    content = path.read_bytes()
    at = content.rindex(b"PK\x01\x02")                                              # the last entry of the directory
    assert content[at + 46:at + 47] == b"x"
    entry = content[at:at + 28] + b"\0\0" + b"\1\0" + content[at + 32:]               # its name becomes "extra"
    path.write_bytes(content[:at] + entry)
    assert open_images(make_config("ZIP", 4, root=path), tmp_path).num_images == 1


def test_file_names_that_are_not_utf8(make_config, noise, png, tmp_path):
    folder = os.fsencode(tmp_path / "tree")
    os.mkdir(folder)
    for name, content in ((b"\xff\xe9.png", png(noise(8, 8, 3))), (b"a\nb\x1b.png", b"broken")):
        with open(folder + b"/" + name, "wb") as file:
            file.write(content)
    refused(make_config("FOLDER", 8, root=tmp_path / "tree"), tmp_path, r"a b\x1b.png: unreadable image")
    assert open_images(make_config("FOLDER", 8, root=tmp_path / "tree", skip_bad=1), tmp_path).num_images == 1


@pytest.mark.parametrize("damage", [
    lambda about: about | {"labels": [10**30] * 3}, lambda about: about | {"labels": [1]}, lambda about: [about],
    lambda about: about | {"labels": [[1], [1, 2], 3]}, lambda about: about | {"bad": 3}, lambda about: {},
    lambda about: about | {"bad": [[1, 2, 3]]}])
def test_a_pack_whose_description_is_odd_is_made_again(make_config, noise, write_zip, tmp_path, damage):
    config = make_config("ZIP", 4, root=write_zip({f"{i}.png": noise(4, 4, 3) for i in range(3)}))
    open_images(config, tmp_path)
    about, = (tmp_path / ".packed").glob("*.json")
    whole = json.loads(about.read_text())
    about.write_text(json.dumps(damage(whole)))
    assert open_images(config, tmp_path).num_images == 3 and json.loads(about.read_text()) == whole


def test_a_pack_of_another_shape_is_made_again(make_config, noise, write_zip, tmp_path):
    config = make_config("ZIP", 4, root=write_zip({"0.png": noise(4, 4, 3)}))
    open_images(config, tmp_path)
    pack, = (tmp_path / ".packed").glob("*.npy")
    for array in (np.zeros((1, 4, 5, 3), np.uint8), np.zeros((1, 4, 4, 3)), np.zeros((0, 4, 4, 3), np.uint8)):
        np.save(pack, array)
        batch, = open_images(config, tmp_path).batches([torch.arange(1)])
        np.testing.assert_array_equal(batch.permute(0, 2, 3, 1)[0], noise(4, 4, 3))


@pytest.mark.parametrize("labels", [np.array([0.5, 1.0]), np.array([0, 10**12]), np.array([[0], [1]]),
                                    np.array(["a", "b"]), np.array([-5, 0])])
def test_labels_in_an_npz_that_are_no_classes(make_config, noise, tmp_path, labels):
    np.savez(tmp_path / "l.npz", noise(2, 8, 8, 3), labels)
    with pytest.raises(DataError, match="l.npz: labels must be whole numbers from 0 to"):
        open_images(make_config("FOLDER", 8, root=tmp_path / "l.npz"), tmp_path)


@pytest.mark.parametrize("label", [10**30, 1.5, "cat", True, -2, None, [0.5, float("nan")], []])
def test_labels_in_a_json_that_are_no_classes(make_config, noise, write_zip, tmp_path, label):
    path = write_zip({"0.png": noise(4, 4, 3), "1.png": noise(4, 4, 3),
                      "dataset.json": json.dumps({"labels": [["0.png", label], ["1.png", label]]})})
    with pytest.raises(DataError, match="the label of 0.png is .*; all must be"):
        open_images(make_config("ZIP", 4, root=path), tmp_path)


def test_a_tar_that_unpacks_to_more_than_cifar(tmp_path):
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz", compresslevel=9) as archive:
        member = tarfile.TarInfo("cifar-10-batches-py/readme")
        member.size = 65 << 20
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(DataError, match="readme unpacks to 65 MiB: a batch of CIFAR-10 may have 64"):
        tool.open_source(tmp_path / "cifar-10-python.tar.gz")


def test_a_picture_in_memory_of_too_many_bytes(monkeypatch):
    monkeypatch.setattr(images, "BYTE_LIMIT", 100)
    with pytest.raises(UnreadableImage, match="a picture may have 0 MiB at most"):
        decode(bytes(101), "x")


def test_a_category_is_no_path(make_config, tmp_path):
    for category in ("../../x", "a/b", "/x", "a\nb"):
        with pytest.raises(UserError, match="data.category"):
            build_dataset(make_config("LSUN", 8, category=category), tmp_path)


def test_damage_that_zlib_finds_in_an_npz(make_config, noise, tmp_path):
    np.savez_compressed(tmp_path / "z.npz", np.zeros((4, 8, 8, 3), np.uint8))
    content = bytearray((tmp_path / "z.npz").read_bytes())
    content[60:70] = b"\xff" * 10
    (tmp_path / "z.npz").write_bytes(content)
    refused(make_config("FOLDER", 8, root=tmp_path / "z.npz"), tmp_path, "z.npz: array 'arr_0' cannot be read")
