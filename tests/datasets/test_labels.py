"""Classes: from dataset.json, folders, file names; and the subset that EDM calls max_size."""

import json

import numpy as np
import pytest
import torch

from datasets import build_dataset, open_dataset
from datasets.image_dataset import limited
from datasets.labels import filename_labels, folder_labels
from datasets.packed import open_images
from utils.errors import DataError, UserError


def with_data(config, **keys):
    """``config`` with keys of ``data`` that it may not know yet."""
    return config.model_copy(update={"data": Asked(config.data, keys)})


class Asked:
    def __init__(self, data, keys):
        self._data, self.__dict__ = data, {"_data": data, **keys}

    def __getattr__(self, name):
        return getattr(self._data, name)


@pytest.fixture
def animals(noise, write_tree):
    """Two folders, whose files are named after something else."""
    names = ["cat/plane_1.png", "cat/bird_2.png", "dog/plane_0.png", "dog/car_x_y.png"]
    return write_tree(dict(zip(names, noise(4, 4, 4, 3), strict=True)))


SORTED = ["cat/bird_2.png", "cat/plane_1.png", "dog/car_x_y.png", "dog/plane_0.png"]


@pytest.mark.parametrize(("rule", "labels"), [
    ("auto", [0, 0, 1, 1]), ("folders", [0, 0, 1, 1]), ("filenames", [0, 2, 1, 2]), ("none", [-1] * 4)])
@pytest.mark.parametrize("cache", ["mmap", "off"])
def test_rules_without_a_json(make_config, animals, tmp_path, rule, labels, cache):
    config = with_data(make_config("FOLDER", 4, root=animals, cache=cache), labels=rule)
    store = open_images(config, tmp_path)
    assert store.labels.tolist() == labels and store.labels.dtype == np.int64
    assert [label for _, label in build_dataset(config, tmp_path)] == labels


@pytest.mark.parametrize(("rule", "labels"), [
    ("auto", [7, 6, 5, 4]), ("folders", [0, 0, 1, 1]), ("filenames", [0, 2, 1, 2]), ("none", [-1] * 4)])
def test_rules_beside_a_json(make_config, animals, tmp_path, rule, labels):
    (animals / "dataset.json").write_text(json.dumps({"labels": [[name, 7 - i] for i, name in enumerate(SORTED)]}))
    config = with_data(make_config("FOLDER", 4, root=animals), labels=rule)
    assert open_images(config, tmp_path).labels.tolist() == labels


def test_another_rule_is_another_pack(make_config, animals, tmp_path):
    config = make_config("FOLDER", 4, root=animals)
    prints = {open_dataset(with_data(config, labels=rule), tmp_path).fingerprint for rule in
              ("auto", "folders", "filenames", "none")}
    assert len(prints) == 4


@pytest.mark.parametrize("files", [["a/0.png", "1.png"], ["a/0.png", "a/1.png"], ["0.png", "1.png"]])
def test_folders_that_are_no_classes(make_config, noise, write_tree, tmp_path, files):
    config = make_config("FOLDER", 4, root=write_tree({name: noise(4, 4, 3) for name in files}))
    assert open_images(config, tmp_path).labels.tolist() == [-1, -1]
    with pytest.raises(DataError, match="needs at least two folders that hold all images"):
        open_images(with_data(config, labels="folders"), tmp_path)


def test_names_without_a_class_and_sets_without_names(make_config, noise, write_tree, tmp_path):
    config = make_config("FOLDER", 4, root=write_tree({"a_0.png": noise(4, 4, 3), "b.png": noise(4, 4, 3)}))
    with pytest.raises(DataError, match="b.png: data.labels filenames takes the text before the first '_'"):
        open_images(with_data(config, labels="filenames"), tmp_path)
    np.savez(tmp_path / "x.npz", noise(2, 4, 4, 3), np.arange(2))
    config = make_config("FOLDER", 4, root=tmp_path / "x.npz")
    with pytest.raises(UserError, match="data.labels folders needs a folder or zip"):
        open_images(with_data(config, labels="folders"), tmp_path)
    assert open_images(with_data(config, labels="none"), tmp_path).labels.tolist() == [-1, -1]
    with pytest.raises(UserError, match="'colours' is unknown; known: auto, filenames"):
        open_images(with_data(config, labels="colours"), tmp_path)


def test_numbering_is_alphabetical():
    names = [f"{name}_{i}.png" for i, name in enumerate(("plane", "car", "bird", "plane"))]
    assert filename_labels("x", names).tolist() == [2, 1, 0, 2]                     # bird is 0, not airplane
    assert folder_labels("x", ["b/0.png", "a/c/1.png", "B/2.png"]).tolist() == [2, 1, 0]


@pytest.mark.parametrize("cache", ["mmap", "off"])
def test_vectors(make_config, noise, write_zip, tmp_path, cache):
    vectors = [[0.5, 1.0], [0, -2.5]]
    path = write_zip({"0.png": noise(4, 4, 3), "1.png": noise(4, 4, 3), "dataset.json": json.dumps(
        {"labels": [["1.png", vectors[1]], ["0.png", vectors[0]]]})})
    labels = open_dataset(make_config("ZIP", 4, root=path), tmp_path).labels
    assert labels.dtype == np.float32 and labels.tolist() == vectors
    for _ in range(2):                                                              # packed, and read back
        store = open_images(make_config("ZIP", 4, root=path, cache=cache), tmp_path)
        assert store.labels.tolist() == [-1, -1]
    assert [label for _, label in build_dataset(make_config("ZIP", 4, root=path), tmp_path)] == [-1, -1]


SUBSETS = [(20, 8, 0, [1, 6, 8, 10, 13, 17, 18, 19]), (20, 8, 3, [1, 2, 4, 6, 7, 14, 16, 17]),
           (5, 9, 0, [0, 1, 2, 3, 4])]


@pytest.mark.parametrize(("total", "max_size", "seed", "indices"), SUBSETS)
def test_max_size_is_edms(total, max_size, seed, indices):
    """Numbers of EDM's own data set class."""
    assert limited(max_size, total, seed).tolist() == indices


def test_max_size_takes_images_and_labels(make_config, noise, write_zip, tmp_path):
    pixels = noise(20, 4, 4, 3)
    labels = {"labels": [[f"{i:02d}.png", i] for i in range(20)]}
    path = write_zip({f"{i:02d}.png": image for i, image in enumerate(pixels)} | {"dataset.json": json.dumps(labels)})
    whole = make_config("ZIP", 4, root=path)
    store = open_images(with_data(whole, max_size=8), tmp_path)
    batch, = store.batches([torch.arange(8)])
    np.testing.assert_array_equal(batch.permute(0, 2, 3, 1), pixels[SUBSETS[0][3]])
    assert store.labels.tolist() == SUBSETS[0][3]
    assert open_images(whole, tmp_path).num_images == 20
