"""Packs: whole or absent, made once, made again when their source changes, and read in every way with one result."""

import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets import open_dataset, packing
from datasets.image_dataset import ImageDataset
from datasets.packed import STORES, open_images, synthetic_images
from tests.faults import jobs
from utils.errors import DataError


def first_batch(store):
    return next(store.batches([torch.arange(store.num_images)])).permute(0, 2, 3, 1).numpy()


def pack_files(root):
    return sorted(path.name for path in (root / ".packed").glob("*.npy"))


@pytest.mark.parametrize("cache", ["auto", "device", "ram", "mmap", "off"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_cache_gives_the_same_batches_in_the_order_asked(make_config, noise, write_zip, tmp_path, cache, workers):
    pixels = noise(9, 6, 4, 3)
    path = write_zip({f"{i}.png": image for i, image in enumerate(pixels)})
    store = open_images(make_config("ZIP", (6, 4), root=path, cache=cache, num_workers=workers), tmp_path)
    endless = (torch.tensor([i % 9, (5 * i) % 9, 8]) for i in itertools.count())
    for i, batch in enumerate(itertools.islice(store.batches(endless), 12)):
        assert batch.dtype == torch.uint8 and batch.shape == (3, 3, 6, 4)
        np.testing.assert_array_equal(batch.permute(0, 2, 3, 1), pixels[[i % 9, (5 * i) % 9, 8]])
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert store.num_images == 9 and store.labels.dtype == np.int64 and store.name == "zip"
    assert bool(pack_files(tmp_path)) == (cache != "off")


def test_no_image_outside_the_set_is_given(make_config, noise, write_zip, tmp_path):
    path = write_zip({"0.png": noise(4, 4, 3), "1.png": noise(4, 4, 3)})
    for index in (-1, 2):
        with pytest.raises(IndexError):
            list(open_images(make_config("ZIP", 4, root=path), tmp_path).batches([torch.tensor([0, index])]))


@pytest.mark.parametrize("workers", [0, 3])
def test_parallel_packing_equals_packing_in_process(make_config, noise, write_zip, tmp_path, workers, monkeypatch,
                                                    caplog):
    pixels = noise(300, 4, 4, 3)
    monkeypatch.setattr(packing, "FEW", 10)
    monkeypatch.setattr(packing, "CHUNK", 7)
    path = write_zip({f"{i:03d}.png": image for i, image in enumerate(pixels)} | {"150.png": b"broken"})
    store = open_images(make_config("ZIP", 4, root=path, num_workers=workers, skip_bad=1), tmp_path)
    np.testing.assert_array_equal(first_batch(store), np.delete(pixels, 150, 0))
    assert caplog.text.count("left out") == 1                                        # not again after every chunk
    with pytest.raises(DataError, match="150.png"):
        open_images(make_config("ZIP", 4, root=path, num_workers=workers), tmp_path)


def test_second_start_reuses_and_a_touched_source_rebuilds(make_config, noise, write_tree, tmp_path, monkeypatch):
    tree = write_tree({"0.png": noise(4, 4, 3), "1.png": noise(4, 4, 3)})
    config = make_config("FOLDER", 4, root=tree)
    first = open_images(config, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_build", lambda *args: pytest.fail("packed again"))
        assert open_images(config, tmp_path).fingerprint == first.fingerprint
    os.utime(tree / "1.png", (1, 1))
    touched = open_images(config, tmp_path)
    assert touched.fingerprint != first.fingerprint
    assert pack_files(tmp_path) == [f"folder-{touched.fingerprint}.npy"]             # the stale one is gone
    write_tree({"2.png": noise(4, 4, 3)})
    assert open_images(config, tmp_path).num_images == 3


def test_fingerprint_covers_transform_size_channels_and_split(make_config, noise, write_tree):
    tree = write_tree({f"{i}.png": noise(8, 8, 3) for i in range(4)}, "afhq")
    prints = [open_dataset(config, tree.parent, split).fingerprint for config, split in [
        (make_config("AFHQ", 8), "train"), (make_config("AFHQ", 4), "train"), (make_config("AFHQ", 8, 1), "train"),
        (make_config("FOLDER", 8, root=tree), "train"), (make_config("AFHQ", 8, validation_fraction=0.5), "train"),
        (make_config("AFHQ", 8, validation_fraction=0.5), "test")]]
    assert len(set(prints)) == 6
    assert open_dataset(make_config("AFHQ", 8, num_workers=3, random_flip=False), tree.parent).fingerprint == prints[0]


def test_a_damaged_pack_is_made_again(make_config, noise, write_zip, tmp_path):
    path = write_zip({"0.png": noise(4, 4, 3)})
    config = make_config("ZIP", 4, root=path)
    open_images(config, tmp_path)
    pack = tmp_path / ".packed" / pack_files(tmp_path)[0]
    for damage in (lambda: os.truncate(pack, 100), lambda: pack.with_suffix(".json").write_text("{"),
                   lambda: pack.with_suffix(".json").unlink()):
        damage()
        np.testing.assert_array_equal(first_batch(open_images(config, tmp_path))[0], noise(4, 4, 3))


def test_a_pipe_in_the_place_of_a_pack_stops_nobody(make_config, noise, write_zip, tmp_path):
    path = write_zip({"0.png": noise(4, 4, 3)})
    config = make_config("ZIP", 4, root=path)
    open_images(config, tmp_path)
    pack = tmp_path / ".packed" / pack_files(tmp_path)[0]
    pack.with_suffix(".json").unlink()
    for about in (pack.with_suffix(".json"), pack.with_name("zip-other.json")):
        os.mkfifo(about)
    np.testing.assert_array_equal(first_batch(open_images(config, tmp_path))[0], noise(4, 4, 3))


def test_a_pack_that_would_fill_the_disk(make_config, noise, write_zip, tmp_path, monkeypatch, caplog):
    path = write_zip({"0.png": noise(4, 4, 3)})
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda folder: type("", (), {"free": 4 * 48 - 1}))
    caplog.set_level("INFO")
    store = open_images(make_config("ZIP", 4, root=path), tmp_path)                   # auto means off
    assert "1 images of 4x4 into 0.0 MB" in caplog.text and "more than a quarter" in caplog.text
    np.testing.assert_array_equal(first_batch(store)[0], noise(4, 4, 3))
    assert not pack_files(tmp_path)
    for cache in ("mmap", "ram", "device"):
        with pytest.raises(DataError, match="more than a quarter"):
            open_images(make_config("ZIP", 4, root=path, cache=cache), tmp_path)


def test_packs_folder_that_cannot_be_made(make_config, noise, write_zip, tmp_path):
    path = write_zip({"0.png": noise(4, 4, 3)})
    (tmp_path / ".packed").write_text("a file in the way")
    assert open_images(make_config("ZIP", 4, root=path), tmp_path).num_images == 1
    with pytest.raises(DataError, match=".packed"):
        open_images(make_config("ZIP", 4, root=path, cache="mmap"), tmp_path)


def pack_slowly(config, root) -> None:
    packing.FEW, packing.CHUNK, read = 10, 5, ImageDataset.read

    def slowly(self, i):
        time.sleep(0.005)
        if i == 100:
            (root / "half-way").touch()
        return read(self, i)

    ImageDataset.read = slowly
    open_images(config, root)


def test_killed_while_packing_then_packed_again(noise, write_zip, tmp_path, make_config):
    pixels = noise(400, 4, 4, 3)
    path = write_zip({f"{i:03d}.png": image for i, image in enumerate(pixels)})
    victim = jobs.Job(pack_slowly, [make_config("ZIP", 4, root=path, num_workers=2), tmp_path])
    jobs.wait_until((tmp_path / "half-way").exists)
    victim.process.kill()
    assert victim.wait() == -signal.SIGKILL
    assert not pack_files(tmp_path) and list((tmp_path / ".packed").glob(".zip-*.tmp"))
    store = open_images(make_config("ZIP", 4, root=path), tmp_path)                   # not held up by orphaned workers
    np.testing.assert_array_equal(first_batch(store), pixels)
    assert not list((tmp_path / ".packed").glob(".*.tmp"))


def test_two_processes_pack_once(noise, write_zip, tmp_path, make_config, monkeypatch):
    path = write_zip({f"{i:03d}.png": image for i, image in enumerate(noise(120, 4, 4, 3))})
    read = ImageDataset.read
    monkeypatch.setattr(ImageDataset, "read", lambda self, i: (time.sleep(0.002), read(self, i))[1])
    monkeypatch.setattr(packing, "_drop_rows", lambda *args: (tmp_path / f"packed-{os.getpid()}").touch())
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=open_images, args=(make_config("ZIP", 4, root=path), tmp_path)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert len(pack_files(tmp_path)) == len(list(tmp_path.glob("packed-*"))) == 1     # one of them did the work
    about = json.loads((tmp_path / ".packed" / pack_files(tmp_path)[0]).with_suffix(".json").read_text())
    assert about["count"] == 120 and about["bad"] == []


def test_a_killed_worker_is_an_error_and_not_a_hang(noise, write_zip, tmp_path, make_config, monkeypatch):
    path = write_zip({f"{i:03d}.png": image for i, image in enumerate(noise(60, 4, 4, 3))})
    monkeypatch.setattr(packing, "FEW", 10)
    monkeypatch.setattr(packing, "_work", _die)
    with pytest.raises(DataError, match="worker process was killed"):
        open_images(make_config("ZIP", 4, root=path, num_workers=2), tmp_path)
    assert not pack_files(tmp_path)


def _die(start, stop):
    os.kill(os.getpid(), signal.SIGKILL)


def read_with_little_memory(path) -> None:
    array = np.load(path, mmap_mode="r")
    used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + (96 << 20), used + (96 << 20)))
    about = {"name": "big", "fingerprint": "", "labels": np.zeros(len(array), np.int64), "device": torch.device("cpu")}
    try:
        STORES["ram"](array, **about)
    except MemoryError:
        print("too large for memory")
    indices = torch.arange(0, len(array), 97).split(256)
    print(sum(int(batch.sum()) for batch in STORES["mmap"](array, **about).batches(indices)))


def test_a_pack_larger_than_memory_is_read_through_mmap(tmp_path):
    """512 MB that lie on disk as holes, in a process that may use 96 MB more than Python and torch need."""
    array = np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.uint8, (1 << 17, 64, 64, 1))
    array[97 * 5] = 3
    array.flush()
    job = jobs.Job(read_with_little_memory, [tmp_path / "big.npy"])
    assert job.wait() == 0, job.text
    assert job.text.splitlines()[:2] == ["too large for memory", str(3 * 64 * 64)]


def test_synthetic_images_answer_for_every_index(make_config):
    store = synthetic_images(make_config("CIFAR10", 8))
    assert store.num_images == 50_000 and (store.labels == -1).all()
    batch, = store.batches([torch.tensor([0, 49_999, 64])])
    assert batch.shape == (3, 3, 8, 8) and torch.equal(batch[0], batch[2]) and not torch.equal(batch[0], batch[1])
    config = make_config("DIGITS", 8, 1)
    config = config.model_copy(update={"training": config.training.model_copy(update={"global_batch_size": 4096})})
    assert synthetic_images(config).num_images == 4096


def test_grey_and_other_shapes(make_config, noise, write_zip, tmp_path):
    pixels = noise(3, 6, 10, 1)
    path = write_zip({f"{i}.png": image for i, image in enumerate(pixels)})
    np.testing.assert_array_equal(first_batch(open_images(make_config("ZIP", (6, 10), 1, root=path), tmp_path)), pixels)


def test_real_images_are_packed_and_reused(cifar_zip, make_config, tmp_path):
    """The 50,000 images in full are measured in docs/data.md; here the reader meets the real archive."""
    images = open_dataset(make_config("ZIP", 32, root=cifar_zip), tmp_path)
    assert len(images) == 50_000 and np.bincount(images.labels).tolist() == [5000] * 10
    assert images.read(0).shape == images.read(49_999).shape == (32, 32, 3)


def test_gathering_ahead_keeps_the_order_and_takes_one_list_in_advance(make_config, noise, write_zip, tmp_path):
    path = write_zip({f"{i}.png": image for i, image in enumerate(noise(5, 4, 4, 3))})
    store = open_images(make_config("ZIP", 4, root=path), tmp_path)
    taken = []
    lists = (taken.append(i) or torch.tensor([i % 5]) for i in itertools.count())
    ahead = store._gather_ahead(lists)                                                # what a GPU is fed from
    for i in range(7):
        np.testing.assert_array_equal(next(ahead)[0], noise(5, 4, 4, 3)[i % 5])
        assert len(taken) == i + 2
    ahead.close()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("cache", ["auto", "device", "ram", "mmap", "off"])
def test_batches_on_a_gpu(make_config, noise, write_zip, tmp_path, cache):
    pixels = noise(9, 8, 8, 3)
    path = write_zip({f"{i}.png": image for i, image in enumerate(pixels)})
    store = open_images(make_config("ZIP", 8, root=path, cache=cache), tmp_path, device="cuda")
    lists = [torch.tensor([i, 8 - i]) for i in range(9)]
    for indices, batch in zip(lists, store.batches(lists), strict=True):
        assert batch.device.type == "cuda" and batch.is_contiguous(memory_format=torch.channels_last)
        np.testing.assert_array_equal(batch.permute(0, 2, 3, 1).cpu(), pixels[indices])
