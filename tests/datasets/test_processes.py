"""Readers in several processes: forked and spawned workers, two ranks, and several readers in one process."""

import multiprocessing

import numpy as np
import pytest
import torch

from datasets import build_dataset, open_dataset
from datasets.order import batch_indices
from datasets.packed import open_images

LMDB_FORMATS = {"CELEBAHQ": "celebahq/train.lmdb", "LSUN": "lsun/tower_train_lmdb"}


@pytest.mark.parametrize("name", sorted(LMDB_FORMATS))
@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("opened_before", [False, True])
def test_lmdb_under_fork(make_config, noise, png, write_lmdb, tmp_path, name, workers, opened_before):
    pixels = noise(8, 4, 4, 3)
    write_lmdb({str(i): png(image) for i, image in enumerate(pixels)}, LMDB_FORMATS[name])
    category = {"category": "tower"} if name == "LSUN" else {}
    config = make_config(name, 4, **category, cache="off", num_workers=workers)
    store = open_images(config, tmp_path)
    if opened_before:
        store.images.read(0)
    lists = [torch.tensor([i, 7 - i]) for i in range(8)]
    for (i, j), batch in zip(lists, store.batches(lists), strict=True):
        np.testing.assert_array_equal(batch.permute(0, 2, 3, 1), pixels[[i, j]])
    np.testing.assert_array_equal(store.images.read(3), pixels[3])                    # the parent's handle still works


def test_readers_under_spawn(make_config, noise, write_lmdb, write_zip, tmp_path):
    pixels = noise(8, 4, 4, 3)
    path = write_zip({f"{i}.png": image for i, image in enumerate(pixels)})
    write_lmdb({str(i): image.tobytes() for i, image in enumerate(pixels)}, LMDB_FORMATS["CELEBAHQ"])
    both = torch.utils.data.ConcatDataset([build_dataset(make_config("ZIP", 4, root=path)),
                                           build_dataset(make_config("CELEBAHQ", 4), tmp_path)])
    assert len(both) == 16 and both[0][1] == both[8][1] == -1                         # both are open in the parent
    loader = torch.utils.data.DataLoader(both, 4, num_workers=2, multiprocessing_context="spawn")
    got = torch.cat([batch for batch, _ in loader]).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(got, np.concatenate([pixels, pixels]))


def _rank(config, root, rank, queue):
    store = open_images(config, root)
    lists = (batch_indices(store.num_images, 4, step, 0).chunk(2)[rank] for step in range(2))
    queue.put(torch.cat(list(store.batches(lists)))[:, 0, 0, 0].tolist())


@pytest.mark.parametrize("cache", ["off", "mmap"])
def test_two_ranks_over_one_lmdb(make_config, write_lmdb, tmp_path, cache):
    write_lmdb({str(i): bytes([i] * 48) for i in range(8)}, "celebahq/train.lmdb")
    config, fork = make_config("CELEBAHQ", 4, cache=cache, num_workers=1), multiprocessing.get_context("fork")
    queue = fork.Queue()
    ranks = [fork.Process(target=_rank, args=(config, tmp_path, rank, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    seen = [queue.get(timeout=300) for _ in ranks]
    for process in ranks:
        process.join()
    assert sorted(seen[0] + seen[1]) == list(range(8))


def test_several_readers_of_one_lmdb_in_one_process(make_config, noise, write_lmdb, tmp_path):
    path = write_lmdb({str(i): image.tobytes() for i, image in enumerate(noise(3, 4, 4, 3))}, "celebahq/train.lmdb")
    first, second = (open_dataset(make_config("CELEBAHQ", 4), tmp_path) for _ in range(2))
    np.testing.assert_array_equal(first.read(1), second.read(1))
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    write_lmdb({"0": (255 - noise(4, 4, 3)).tobytes()}, "celebahq/train.lmdb")        # replaced under its readers
    np.testing.assert_array_equal(open_dataset(make_config("CELEBAHQ", 4), tmp_path).read(0), 255 - noise(4, 4, 3))
