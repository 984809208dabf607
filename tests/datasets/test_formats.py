"""Each format, made by its ordinary library with known pixels, gives just those pixels after the stated transform."""

import functools
import hashlib
import http.server
import io
import json
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import DATASETS, build_dataset, find_dataset
from datasets.packed import open_images
from utils.errors import DataError, UserError


def read_all(config, root=None, split="train"):
    """(uint8 (N, H, W, C), labels) through build_dataset; open_images must give the same."""
    dataset = build_dataset(config, root, split)
    images = torch.stack([image for image, _ in dataset]).permute(0, 2, 3, 1).numpy()
    labels = [label for _, label in dataset]
    store = open_images(config, root, split)
    packed = next(store.batches([torch.arange(store.num_images)])).permute(0, 2, 3, 1).numpy()
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, packed)
    assert store.labels.tolist() == labels
    return images, labels


def write_cifar(folder, noise, names):
    folder.mkdir(parents=True)
    images = noise(4, 32, 32, 3)
    rows = images.transpose(0, 3, 1, 2).reshape(4, -1)
    for k, name in enumerate(names):
        with open(folder / name, "wb") as file:
            pickle.dump({b"data": rows + np.uint8(k), b"labels": [k, 1, 2, 3]}, file, protocol=2)
    return images


BATCHES = [f"data_batch_{i}" for i in range(1, 6)]


@pytest.mark.parametrize("where", ["cifar10/cifar-10-batches-py", "cifar10_test/cifar-10-batches-py",
                                   "cifar-10-batches-py"])
def test_cifar10(tmp_path, make_config, noise, where):
    first = write_cifar(tmp_path / where, noise, [*BATCHES, "test_batch"])
    images, labels = read_all(make_config("CIFAR10", 32), tmp_path)
    assert images.shape == (20, 32, 32, 3) and labels[4:8] == [1, 1, 2, 3]
    np.testing.assert_array_equal(images[:4], first)
    np.testing.assert_array_equal(images[4:8], first + np.uint8(1))
    images, labels = read_all(make_config("CIFAR10", 32), tmp_path, "test")
    np.testing.assert_array_equal(images, first + np.uint8(5))


def test_cifar10_data_root_may_be_the_set_or_its_parent(tmp_path, make_config, noise):
    write_cifar(tmp_path / "x/cifar10/cifar-10-batches-py", noise, BATCHES)
    for root in ("x", "x/cifar10", "x/cifar10/cifar-10-batches-py"):
        found = find_dataset(make_config("CIFAR10", 32, root=tmp_path / root))
        assert found == tmp_path / "x/cifar10/cifar-10-batches-py"


@pytest.mark.parametrize("folder", ["celeba", "celeba/celeba"])
def test_celeba_crop_by_coordinates(tmp_path, make_config, folder):
    faces = tmp_path / folder / "img_align_celeba"
    faces.mkdir(parents=True)
    rows, columns = np.mgrid[0:218, 0:178].astype(np.uint8)
    image = np.stack([rows, columns, np.zeros_like(rows)], -1)                   # a pixel knows where it lies
    for name in ("000001", "000002", "000003", "000004"):
        Image.fromarray(image).save(faces / f"{name}.jpg", "PNG")               # exact pixels under the official name
    (faces.parent / "list_eval_partition.txt").write_text("000001.jpg 0\n000002.jpg 1\n000003.jpg 2\n000004.jpg 0\n")
    images, labels = read_all(make_config("CELEBA", 128), tmp_path)
    assert len(images) == 2 and labels == [-1, -1]
    np.testing.assert_array_equal(images[0], image[57:185, 25:153])
    images, _ = read_all(make_config("CELEBA", 64), tmp_path, "test")
    expected = Image.fromarray(image[57:185, 25:153]).resize((64, 64), Image.Resampling.BILINEAR)
    assert len(images) == 1
    np.testing.assert_array_equal(images[0], np.array(expected))


@pytest.mark.parametrize("folder", ["celebahq-lmdb", "celebahq"])
@pytest.mark.parametrize("raw", [True, False])
def test_celebahq(make_config, noise, png, write_lmdb, tmp_path, folder, raw):
    pixels = noise(12, 16, 16, 3)
    for split, part in (("train", pixels[:11]), ("validation", pixels[11:])):
        write_lmdb({str(i): image.tobytes() if raw else png(image) for i, image in enumerate(part)},
                   f"{folder}/{split}.lmdb")
    images, labels = read_all(make_config("CELEBAHQ", 16), tmp_path)
    np.testing.assert_array_equal(images, pixels[:11])                           # 2 before 10: by number, not by text
    images, _ = read_all(make_config("CELEBAHQ", 8), tmp_path, "test")
    np.testing.assert_array_equal(images[0], np.array(Image.fromarray(pixels[11]).resize((8, 8), Image.BILINEAR)))


def test_raw_pixels_that_begin_like_a_jpeg(make_config, noise, write_lmdb, tmp_path):
    pixels = noise(2, 16, 16, 3)
    pixels[:, 0, 0] = 255, 216, 255
    write_lmdb({str(i): image.tobytes() for i, image in enumerate(pixels)}, "celebahq/train.lmdb")
    np.testing.assert_array_equal(read_all(make_config("CELEBAHQ", 16), tmp_path)[0], pixels)


@pytest.mark.parametrize(("name", "folder"), [("FFHQ64", "ffhq64"), ("AFHQ", "afhq")])
def test_trees_of_any_depth(make_config, noise, write_tree, tmp_path, name, folder):
    pixels = noise(3, 16, 16, 3)
    write_tree({"b/0.png": pixels[2], "a/1.PNG": pixels[1], "a/0/deep/er.png": pixels[0], "a/readme.txt": b"x",
                ".hidden/0.png": pixels[0], "a/.0.png": pixels[0]}, folder)
    images, labels = read_all(make_config(name, 16), tmp_path)
    np.testing.assert_array_equal(images, pixels)
    assert labels == {"FFHQ64": [-1] * 3, "AFHQ": [0, 0, 1]}[name]     # FFHQ's folders number its images


def test_lsun(make_config, noise, png, write_lmdb, tmp_path):
    pixels = noise(2, 8, 12, 3)
    write_lmdb({"f00": png(pixels[0]), "a7c": png(pixels[1])}, "lsun/tower_train_lmdb")
    write_lmdb({"0": png(pixels[0])}, "lsun/tower_val_lmdb")
    (tmp_path / "lsun/_cache_tower_train_lmdb").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")     # never opened
    images, _ = read_all(make_config("LSUN", 8, category="tower"), tmp_path)
    np.testing.assert_array_equal(images, pixels[::-1, :, 2:10])
    images, _ = read_all(make_config("LSUN", 8, category="tower"), tmp_path, "test")
    np.testing.assert_array_equal(images, pixels[:1, :, 2:10])
    direct = make_config("LSUN", 8, category="tower", root=tmp_path / "lsun/tower_train_lmdb")
    assert find_dataset(direct).resolve() == tmp_path / "lsun"
    with pytest.raises(UserError, match="data.category None must name the LSUN category"):
        find_dataset(make_config("LSUN", 8), tmp_path)


def test_ffhq_lmdb_and_its_split(make_config, noise, png, write_lmdb, tmp_path):
    pixels = noise(20, 8, 8, 3)
    records = {f"8-{i:05d}": png(image) for i, image in enumerate(pixels)}
    write_lmdb(records | {"length": b"20", "16-00000": png(pixels[0])}, "FFHQ")
    shuffled = list(range(20))                                                   # as DDIM does it, on a list
    np.random.RandomState(2019).shuffle(shuffled)
    np.testing.assert_array_equal(read_all(make_config("FFHQ", 8), tmp_path)[0], pixels[sorted(shuffled[:18])])
    np.testing.assert_array_equal(read_all(make_config("FFHQ", 8), tmp_path, "test")[0], pixels[sorted(shuffled[18:])])
    with pytest.raises(DataError, match=r"no images of side 4, only of \[8, 16\]"):
        read_all(make_config("FFHQ", 4), tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("name", "side"), [("IMAGENET32", 32), ("IMAGENET64", 64)])
def test_imagenet_npz(make_config, noise, tmp_path, save, name, side):
    folder = tmp_path / name.lower()
    folder.mkdir()
    pixels = noise(22, side, side, 3)
    rows = pixels.transpose(0, 3, 1, 2).reshape(22, -1)
    for i in range(10):
        save(folder / f"train_data_batch_{i + 1}.npz", data=rows[2 * i:2 * i + 2], labels=np.array([i + 1, 1000]),
             mean=np.zeros(3))
    save(folder / "val_data.npz", data=rows[20:], labels=np.array([1, 2]))
    images, labels = read_all(make_config(name, side), tmp_path)
    np.testing.assert_array_equal(images, pixels[:20])                           # batch 10 after batch 9
    assert labels == [label for i in range(10) for label in (i, 999)]
    images, labels = read_all(make_config(name, side), tmp_path, "test")
    np.testing.assert_array_equal(images, pixels[20:])
    assert labels == [0, 1]


@pytest.mark.parametrize("channels", [1, 3])
def test_zip_with_labels(make_config, noise, write_zip, channels, tmp_path):
    pixels = noise(3, 8, 6, channels)
    names = ["00000/img00000000.png", "00000/img00000001.png", "00001/img00000002.png"]
    path = write_zip({"dataset.json": json.dumps({"labels": [[names[2], 5], [names[0], 3], [names[1], 4]]}),
                      **dict(zip(names, pixels, strict=True))})
    images, labels = read_all(make_config("ZIP", (8, 6), channels, root=path), tmp_path)
    np.testing.assert_array_equal(images, pixels)
    assert labels == [3, 4, 5]
    assert read_all(make_config("ZIP", (8, 6), channels), path)[1] == [3, 4, 5]  # the archive given as root


@pytest.mark.parametrize("text", ['{"labels": null}', '{"labels": [["0.png", [0.5, 1.5]]]}'])
def test_zip_without_class_labels(make_config, noise, write_zip, text, tmp_path):
    path = write_zip({"0.png": noise(8, 8, 3), "dataset.json": text})
    assert read_all(make_config("ZIP", 8, root=path), tmp_path)[1] == [-1]


def test_folder_crops_to_the_centre_and_converts_modes(make_config, noise, write_tree, png, tmp_path):
    pixels = noise(8, 12, 3)
    grey, palette = Image.fromarray(pixels).convert("L"), Image.fromarray(pixels).quantize(16)
    alpha = Image.fromarray(np.concatenate([pixels, noise(8, 12, 1)], -1), "RGBA")
    files = {}
    for name, image in (("1.png", grey), ("2.png", palette), ("3.png", alpha)):
        file = io.BytesIO()
        image.save(file, "PNG")
        files[name] = file.getvalue()
    tree = write_tree({"0.png": pixels, **files})
    images, _ = read_all(make_config("FOLDER", 8, root=tree), tmp_path)
    for got, expected in zip(images, (pixels, np.array(grey.convert("RGB")), np.array(palette.convert("RGB")), pixels),
                             strict=True):
        np.testing.assert_array_equal(got, expected[:, 2:10])
    images, _ = read_all(make_config("FOLDER", 8, 1, root=tree), tmp_path)
    np.testing.assert_array_equal(images[0][..., 0], np.array(grey)[:, 2:10])


@pytest.mark.parametrize("channels", [1, 3])
def test_ddpm_ip_single_array(make_config, noise, tmp_path, channels):
    pixels = noise(5, 8, 8, channels)
    np.savez(tmp_path / "set.npz", pixels, np.arange(5))
    images, labels = read_all(make_config("FOLDER", 8, channels, root=tmp_path / "set.npz"), tmp_path)
    np.testing.assert_array_equal(images, pixels)
    assert labels == list(range(5))
    np.save(tmp_path / "set.npy", pixels)
    np.testing.assert_array_equal(
        read_all(make_config("FOLDER", 8, channels, root=tmp_path / "set.npy"), tmp_path)[0], pixels)


def test_digits_are_those_of_scikit_learn(make_config, tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = read_all(make_config("DIGITS", 8, 1), tmp_path)
    np.testing.assert_array_equal(images[..., 0], np.rint(digits.images * 255 / 16))
    assert labels == digits.target.tolist()
    images, _ = read_all(make_config("DIGITS", 16, 1), tmp_path)
    expected = Image.fromarray(np.rint(digits.images[0] * 255 / 16).astype(np.uint8)).resize((16, 16), Image.BILINEAR)
    np.testing.assert_array_equal(images[0, ..., 0], np.array(expected))


def test_validation_fraction_splits_disjointly_and_completely(make_config, noise, write_zip, tmp_path):
    pixels = noise(10, 4, 4, 3)
    path = write_zip({f"{i}.png": image for i, image in enumerate(pixels)})
    config = make_config("ZIP", 4, root=path, validation_fraction=0.3)
    train, test = (read_all(config, tmp_path, split)[0] for split in ("train", "test"))
    assert len(train) == 7 and len(test) == 3
    assert {image.tobytes() for image in (*train, *test)} == {image.tobytes() for image in pixels}
    with pytest.raises(DataError, match="set data.validation_fraction"):
        build_dataset(make_config("ZIP", 4, root=path), tmp_path, "test")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The URL under which this machine serves ``tmp_path`` to itself."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_cifar10_download_is_checked_and_atomic(tmp_path, make_config, noise, monkeypatch, served):
    from torchvision.datasets import CIFAR10

    first = write_cifar(tmp_path / "made/cifar-10-batches-py", noise, [*BATCHES, "test_batch"])
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "made/cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(CIFAR10, "url", f"{served}/c.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(DataError, match="cannot be downloaded"):
        build_dataset(make_config("CIFAR10", 32), tmp_path / "data")
    assert [p.name for p in (tmp_path / "data").iterdir()] == [".cifar10.lock"]          # nothing half written
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5((tmp_path / "c.tar.gz").read_bytes()).hexdigest())
    images, _ = read_all(make_config("CIFAR10", 32), tmp_path / "data")
    np.testing.assert_array_equal(images[:4], first)
    with pytest.raises(DataError, match="not found"):                      # an explicit root is not filled
        build_dataset(make_config("CIFAR10", 32, root=tmp_path / "elsewhere"))


def test_cifar10_without_network_is_one_line(tmp_path, make_config, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(DataError, match="cannot be downloaded") as error:
        build_dataset(make_config("CIFAR10", 32), tmp_path)
    assert "\n" not in str(error.value)


def test_every_data_set_of_the_documentation_is_there():
    assert set(DATASETS) == {"CIFAR10", "CELEBA", "CELEBAHQ", "FFHQ64", "AFHQ", "LSUN", "FFHQ", "IMAGENET32",
                             "IMAGENET64", "ZIP", "FOLDER", "DIGITS", "CAPTIONS"}
