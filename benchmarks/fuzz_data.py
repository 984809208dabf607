"""Data sets that are fuzzed, and what all kinds are made with; see ``fuzz_kinds``."""

import io
import json
import pickle
import random
import tarfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np

SIDE = 8
TINY = {"data": {"dataset": "DIGITS", "image_size": SIDE, "channels": 3, "num_workers": 0},
        "model": {"in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": []},
        "training": {"batch_size": 2}}


@cache
def noise() -> np.ndarray:
    return np.random.RandomState(7).randint(0, 256, (4, SIDE, SIDE, 3), np.uint8)


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write(folder: Path, files: dict[str, bytes | str]) -> list[str]:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(files)


@cache
def tiny_model():
    from configs.schema import Config
    from models import build_model

    return build_model(Config.model_validate(TINY))


def make_tree(folder: Path, rng) -> list[str]:
    files = {f"tree/{'ab'[i % 2]}/{i}.{kind.lower()}": png(image, kind) for i, (image, kind) in
             enumerate(zip(noise(), ("PNG", "JPEG", "BMP", "GIF"), strict=True))}
    labels = {"labels": [[name.removeprefix("tree/"), i] for i, name in enumerate(files)]}
    return write(folder, files | {"tree/dataset.json": json.dumps(labels)})


def make_zip(folder: Path, rng) -> list[str]:
    import zipfile

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for i, image in enumerate(noise()):
            archive.writestr(f"{i}.png", png(image))
        archive.writestr("dataset.json", json.dumps({"labels": [[f"{i}.png", i] for i in range(4)]}))
    return write(folder, {"x.zip": file.getvalue()})


def make_npz(folder: Path, rng) -> list[str]:
    file = io.BytesIO()
    rng.choice((np.savez, np.savez_compressed))(file, noise(), np.arange(4))
    return write(folder, {"x.npz": file.getvalue()})


def make_npy(folder: Path, rng) -> list[str]:
    file = io.BytesIO()
    np.save(file, noise())
    return write(folder, {"x.npy": file.getvalue()})


def make_lmdb(folder: Path, rng) -> list[str]:
    import lmdb

    raw = rng.random() < 0.5
    (folder / "x.lmdb").mkdir()
    with lmdb.open(str(folder / "x.lmdb"), map_size=1 << 22) as environment, environment.begin(write=True) as put:
        for i in range(60):
            image = noise()[i % 4]
            large = bytes(6000 * (i == 7))                # behind the picture, which then takes pages of its own
            put.put(b"%d" % i, image.tobytes() if raw else png(image) + large)
    return ["x.lmdb/data.mdb"]


def make_ffhq(folder: Path, rng) -> list[str]:
    import lmdb

    (folder / "FFHQ").mkdir()
    with lmdb.open(str(folder / "FFHQ"), map_size=1 << 22) as environment, environment.begin(write=True) as put:
        for i in range(20):
            put.put(b"%d-%05d" % (SIDE, i), png(noise()[i % 4]))
        put.put(b"length", b"20")
    return ["FFHQ/data.mdb"]


def make_cifar(folder: Path, rng) -> list[str]:
    images = np.zeros((2, 3072), np.uint8)
    return write(folder, {f"cifar10/cifar-10-batches-py/data_batch_{i}":
                          pickle.dumps({b"data": images, b"labels": [0, 1]}, 2) for i in range(1, 6)})


def make_imagenet(folder: Path, rng) -> list[str]:
    files = {}
    for i in range(1, 3):
        file = io.BytesIO()
        rng.choice((np.savez, np.savez_compressed))(file, data=noise().reshape(4, -1), labels=np.arange(1, 5))
        files[f"imagenet32/train_data_batch_{i}.npz"] = file.getvalue()
    return write(folder, files)


def make_celeba(folder: Path, rng) -> list[str]:
    face = np.zeros((218, 178, 3), np.uint8)
    return write(folder, {**{f"celeba/img_align_celeba/00000{i}.jpg": png(face, "JPEG") for i in (1, 2)},
                          "celeba/list_eval_partition.txt": "000001.jpg 0\n000002.jpg 2\n"})


def make_pack(folder: Path, rng) -> list[str]:
    """A sound zip with its pack, which is damaged."""
    make_zip(folder, rng)
    read_dataset("ZIP", "x.zip", cache="mmap")(folder, rng)
    return [f"packs/.packed/{path.name}" for path in (folder / "packs/.packed").iterdir() if path.suffix != ".lock"]


def make_captions(folder: Path, rng) -> list[str]:
    """Captioned pictures: a folder with its list, or a tar shard."""
    pictures = {f"{i}.jpg": png(image, "JPEG") for i, image in enumerate(noise())}
    if rng.random() < 0.5:
        lines = "".join(json.dumps({"file_name": name, "text": f"a square, {name}"}) + "\n" for name in pictures)
        placed = {f"captions/{name}": data for name, data in pictures.items()}
        return write(folder, placed | {"captions/metadata.jsonl": lines})
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in pictures.items():
            for entry, content in ((name, data), (name.replace("jpg", "txt"), b"a square")):
                info = tarfile.TarInfo(entry)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return write(folder, {"captions/0.tar": file.getvalue()})


def read_captions(folder: Path, rng) -> None:
    from datasets.captions import open_captioned
    from datasets.images import UnreadableImage

    reader = open_captioned(folder / "captions", 3)
    reader.stamp()
    for i in range(len(reader)):
        reader.captions[i].encode()
        with suppress(UnreadableImage):
            reader.read(i)


def open_pack_of_latents(folder: Path, stop: int | None = None):
    """The latents of four pictures, packed if they are not there; ``stop``: a kill before this picture."""
    import torch

    from configs.schema import Config
    from datasets import open_dataset
    from datasets.latents import open_latents

    data = {**TINY["data"], "dataset": "FOLDER", "root": str(folder / "tree")}
    images = open_dataset(Config.model_validate({**TINY, "data": data}))
    rows = {"moments": torch.ones(1, 2, 4, 2, 2), "time_ids": torch.ones(1, 6), "prompt_embeds": torch.ones(3, 5)}

    def encode(i: int) -> dict:
        if i == stop:
            raise KeyboardInterrupt
        return rows

    return open_latents(folder / "packs", images, fingerprint="0" * 16, dtype="bfloat16", captions=list("abcd"),
                        device="cpu", cache="mmap", skip_bad=0, encode=encode,
                        empty=lambda: {"prompt_embeds": rows["prompt_embeds"]})


def make_latents(folder: Path, rng) -> list[str]:
    """A pack of latents, whole or half-made, of sound pictures."""
    make_tree(folder, rng)
    with suppress(KeyboardInterrupt):
        open_pack_of_latents(folder, rng.choice((None, 2)))
    return [str(path.relative_to(folder)) for path in (folder / "packs").rglob("*")
            if path.is_file() and path.suffix != ".lock"]


def read_latents(folder: Path, rng) -> None:
    import torch

    store = open_pack_of_latents(folder)
    for i in range(store.num_images):
        next(iter(store.batches([torch.tensor([i])])))
        store.condition(torch.tensor([i]))


def read_dataset(name: str, root: str | None = None, cache: str | None = None, side: int = SIDE):
    """Open as training does, through a pack or (by chance) without one, and take every image."""
    def read(folder: Path, rng: random.Random) -> None:
        import torch

        from configs.schema import Config
        from datasets.packed import open_images

        data = {**TINY["data"], "dataset": name, "image_size": side, "cache": cache or rng.choice(("mmap", "off")),
                "skip_bad": rng.choice((0, 2)), "root": str(folder / root) if root else None}
        config = Config.model_validate({**TINY, "data": data})
        store = open_images(config, folder / "packs" if root else folder)
        for _ in store.batches([torch.arange(store.num_images)]):
            pass

    return read


def read_by_tool(folder: Path, rng: random.Random) -> None:
    """``dataset_tool.py`` on whatever source lies there."""
    import dataset_tool
    from datasets import tool

    source = next(folder.iterdir(), folder / "missing")
    flags = rng.choice(([], ["--resolution", "4x4"], ["--resolution", "4x4", "--transform", "center-crop"]))
    dest = folder / f"made{rng.choice(('.zip', '', '.npy', '.lmdb'))}"
    for argv in (["info", "--source", str(source)],
                 ["convert", "--source", str(source), "--dest", str(dest), "--workers", "0", *flags]):
        getattr(tool, argv[0])(dataset_tool.parse(argv))


def make_any(folder: Path, rng: random.Random) -> list[str]:
    return rng.choice((make_tree, make_zip, make_npz, make_npy, make_lmdb))(folder, rng)


DATA_KINDS = {
    "tree": (make_tree, read_dataset("FOLDER", "tree")), "zip": (make_zip, read_dataset("ZIP", "x.zip")),
    "npz": (make_npz, read_dataset("FOLDER", "x.npz")), "npy": (make_npy, read_dataset("FOLDER", "x.npy")),
    "lmdb": (make_lmdb, read_dataset("FOLDER", "x.lmdb")), "ffhq": (make_ffhq, read_dataset("FFHQ")),
    "cifar": (make_cifar, read_dataset("CIFAR10", side=32)), "imagenet": (make_imagenet, read_dataset("IMAGENET32")),
    "celeba": (make_celeba, read_dataset("CELEBA")), "pack": (make_pack, read_dataset("ZIP", "x.zip", "mmap")),
    "captions": (make_captions, read_captions), "latents": (make_latents, read_latents),
    "tool": (make_any, read_by_tool),
}
