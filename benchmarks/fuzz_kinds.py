"""What is fuzzed: for each kind ``make(folder, rng) -> names`` writes sound files and tells which may be damaged, and
``read(folder, rng)`` is what the program does with them."""

import io
import json
import pickle
import random
import re
from contextlib import redirect_stdout, suppress
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import yaml

SIDE = 8
TINY = {"data": {"dataset": "DIGITS", "image_size": SIDE, "channels": 3, "num_workers": 0},
        "model": {"in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": []},
        "training": {"batch_size": 2}}
DIM = 16                    # features of the statistics, 2,048 in earnest


@cache
def noise() -> np.ndarray:
    return np.random.RandomState(7).randint(0, 256, (4, SIDE, SIDE, 3), np.uint8)


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@cache
def pickle_seeds() -> list[bytes]:
    """Pickles of every protocol as numpy writes them, statistics wrapped in npy, a CIFAR-10 batch."""
    statistics = {"mu": np.arange(4.0), "sigma": np.eye(4), "n": np.float64(3), "flags": np.array([True, False]),
                  "whole": np.arange(6, dtype=np.int32).reshape(2, 3, order="F")}
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2], b"filenames": [b"a.png", b"b.png"]}
    wrapped = io.BytesIO()
    np.save(wrapped, statistics, allow_pickle=True)
    return [wrapped.getvalue(), *(pickle.dumps(value, protocol) for value in (statistics, batch)
                                  for protocol in range(6))]


def write(folder: Path, files: dict[str, bytes | str]) -> list[str]:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(files)


# ------------------------------------------------------------------------------------------------- pickles and weights

def read_pickle(folder: Path, rng) -> None:
    from utils.safe_load import load_pickle

    load_pickle(folder / "x.npy")


@cache
def weight_seeds() -> dict[str, bytes]:
    """A checkpoint of each program, by file name."""
    import argparse

    import torch

    from configs.schema import Config
    from models import build_model

    state = build_model(Config.model_validate(TINY)).state_dict()
    slots = {i: {"step": torch.tensor(3.0), "ema": tensor.clone()} for i, tensor in enumerate(state.values())}
    optimizer = {"state": slots, "param_groups": [{"lr": 1e-4, "params": list(slots)}]}
    contents = {
        "ckpt.pth": {"format_version": 1, "config": TINY, "step": 3, "epoch": 1, "model": state, "ema": state},
        "model_3_ema.pth": {f"module.{name}": tensor for name, tensor in state.items()},
        "ckpt_3.pth": {"model_dict": state, "epoch": 3, "optimizer": optimizer, "config": argparse.Namespace(a=1)},
        "ddim.pth": [state, optimizer, 3, 70, state]}
    seeds = {}
    for legacy in (False, True):
        for name, content in contents.items():
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=not legacy)
            seeds[f"{'old/' if legacy else ''}{name}"] = file.getvalue()
    return seeds


def make_weights(folder: Path, rng: random.Random) -> list[str]:
    name = rng.choice(list(weight_seeds()))
    return write(folder, {name: weight_seeds()[name]})


@cache
def tiny_model():
    from configs.schema import Config
    from models import build_model

    return build_model(Config.model_validate(TINY))


def read_weights(folder: Path, rng) -> None:
    from models.weights import load_weights

    for path in sorted(folder.rglob("*.pth")):
        load_weights(tiny_model(), path)


def make_diffusers(folder: Path, rng) -> list[str]:
    from safetensors.torch import save

    settings = {"_class_name": "UNet2DModel", "sample_size": SIDE, "block_out_channels": [32], "layers_per_block": 1,
                "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "flip_sin_to_cos": False,
                "freq_shift": 1, "norm_eps": 1e-6, "downsample_padding": 0, "attention_head_dim": 32}
    state = {name: tensor.contiguous() for name, tensor in tiny_model().state_dict().items()}
    return write(folder, {"config.json": json.dumps(settings), "diffusion_pytorch_model.safetensors": save(state)})


def read_diffusers(folder: Path, rng) -> None:
    from models.weights import load_weights

    load_weights(tiny_model(), folder)


def make_run(folder: Path, rng) -> list[str]:
    metrics = "".join(json.dumps({"step": i, "loss": 1.0, "lr": 1e-4, "epoch": 1}) + "\n" for i in range(3))
    return write(folder, {"config.yml": yaml.safe_dump(TINY), "ckpt.pth": weight_seeds()["ckpt.pth"],
                          "ckpt_1.pth": weight_seeds()["ckpt.pth"], "metrics.jsonl": metrics})


def read_run(folder: Path, rng) -> None:
    from configs.schema import load_config
    from runners.training.checkpoint import RunFolder

    run = RunFolder(folder)
    load_config(run.config)
    run.weights()
    run.load_newest()


# ------------------------------------------------------------------------------------------------------- texts, tables

def make_yaml(folder: Path, rng) -> list[str]:
    shipped = sorted((Path(__file__).parents[1] / "configs").glob("*.yml"))
    return write(folder, {"c.yml": rng.choice(shipped).read_bytes()})


def read_yaml(folder: Path, rng) -> None:
    from configs.schema import load_config

    load_config(folder / "c.yml")


def make_study(folder: Path, rng) -> list[str]:
    shipped = sorted((Path(__file__).parents[1] / "configs/studies").glob("*.yml"))
    return write(folder, {"s.yml": rng.choice(shipped).read_bytes()})


def read_study(folder: Path, rng) -> None:
    from configs.study import load_study

    load_study(folder / "s.yml")


def make_log(folder: Path, rng) -> list[str]:
    entries = [{"fid": 3.5 + i, "name": "FID-500", "checkpoint": "a/ckpt.pth", "seeds": "0-499", "sampler":
                {"timesteps": 10 * i + 10, "eta": 0.0}, "reference": "x.npz", "kid": 0.1} for i in range(4)]
    return write(folder, {"log.jsonl": "".join(json.dumps(entry) + "\n" for entry in entries)})


def read_log(folder: Path, rng) -> None:
    from runners.evaluation.comparison import read_logs, rows

    rows(read_logs([folder / "log.jsonl"]))


def make_manifest(folder: Path, rng) -> list[str]:
    return write(folder, {"images/manifest.json": json.dumps(MANIFEST, indent=1)})


MANIFEST = {"weights": "0" * 16, "amp": "off", "sampler": {"timesteps": [0, 10], "eta": 0.0}, "model": {"arch": "unet"}}


def read_manifest(folder: Path, rng) -> None:
    from runners.sampling.folder import ImageFolder

    ImageFolder(folder / "images").prepare(MANIFEST)


def make_statistics(folder: Path, rng) -> list[str]:
    arrays = {"mu": np.zeros(DIM), "sigma": np.eye(DIM), "features": np.zeros((4, DIM), np.float32),
              "provenance": np.array(json.dumps({"count": 4, "preprocess": "pytorch-fid"}))}
    file = io.BytesIO()
    if rng.random() < 0.5:
        rng.choice((np.savez, np.savez_compressed))(file, **arrays)
        return write(folder, {"s.npz": file.getvalue()})
    np.save(file, {"mu": arrays["mu"], "sigma": arrays["sigma"]}, allow_pickle=True)
    return write(folder, {"s.npy": file.getvalue()})


def read_statistics(folder: Path, rng) -> None:
    from runners.evaluation import references

    references.DIM = DIM
    for path in folder.iterdir():
        reference = references.load_reference(path)
        if reference.features is not None:
            reference.features.mean()


# ----------------------------------------------------------------------------------------------------------- data sets

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

    source = next(folder.iterdir(), folder / "missing")
    flags = rng.choice(([], ["--resolution", "4x4"], ["--resolution", "4x4", "--transform", "center-crop"]))
    dest = folder / f"made{rng.choice(('.zip', '', '.npy', '.lmdb'))}"
    for argv in (["info", "--source", str(source)],
                 ["convert", "--source", str(source), "--dest", str(dest), "--workers", "0", *flags]):
        args = dataset_tool.parse(argv)
        args.run(args)


def make_any(folder: Path, rng: random.Random) -> list[str]:
    return rng.choice((make_tree, make_zip, make_npz, make_npy, make_lmdb))(folder, rng)


# ----------------------------------------------------------------------------------------------------------- arguments

SCRIPTS = {"train_ddp": "configure", "generate": "check", "fid": "check", "dataset_tool": None, "diagnose": "check",
           "study": "check"}
VALUES = ["", "0", "1", "-1", "2", "1e400", "nan", "inf", "5-1", "1,1", "0-99999999999", "1" * 40, "a", "..", "../x",
          "/nowhere/x", "digits.yml", "digits", "ddim50", "8x8", "png", "heun", "quad", "[", "{", "[1,2]", "null",
          "off", "!!python/object:os.system", "\n", "é", "\udcff", "\x1b[2J", "x" * 5000, "/dev/zero", "train",
          "cifar10_tiny"]


@cache
def flags_of(script: str) -> tuple[list[str], list[str]]:
    """Sub-commands and flags that a script's own help names, and the keys of the configuration."""
    from configs.schema import dotted_keys

    module, text = import_module(script), io.StringIO()

    def help_of(*argv):
        with redirect_stdout(text), suppress(SystemExit):
            module.parse([*argv, "--help"])

    help_of()
    commands = re.findall(r"^    ([a-z][\w-]+)  ", text.getvalue(), re.MULTILINE)
    found = re.search(r"\{([\w,-]+)\}|metavar", text.getvalue())
    commands = commands or (found[1].split(",") if found and found[1] else [])
    for command in commands:
        help_of(command)
    flags = sorted(set(re.findall(r"(?<![\w-])(--?[A-Za-z][\w-]*)", text.getvalue())))
    return commands, [*flags, *(f"--{key}" for key in dotted_keys())]


def read_arguments(folder: Path, rng: random.Random) -> None:
    script = rng.choice(list(SCRIPTS))
    commands, flags = flags_of(script)
    words = [rng.choice(commands)] if commands and rng.random() < 0.9 else []
    for _ in range(rng.randrange(7)):
        words += [rng.choice(flags)] * (rng.random() < 0.9) + [rng.choice(VALUES)] * (rng.random() < 0.8)
    module = import_module(script)
    args = module.parse([*words, "--exp", str(folder / "exp")])
    if SCRIPTS[script]:
        getattr(module, SCRIPTS[script])(args)


KINDS = {
    "pickles": (lambda folder, rng: write(folder, {"x.npy": rng.choice(pickle_seeds())}), read_pickle),
    "weights": (make_weights, read_weights), "diffusers": (make_diffusers, read_diffusers), "run": (make_run, read_run),
    "yaml": (make_yaml, read_yaml), "study": (make_study, read_study), "log": (make_log, read_log),
    "manifest": (make_manifest, read_manifest), "statistics": (make_statistics, read_statistics),
    "tree": (make_tree, read_dataset("FOLDER", "tree")), "zip": (make_zip, read_dataset("ZIP", "x.zip")),
    "npz": (make_npz, read_dataset("FOLDER", "x.npz")), "npy": (make_npy, read_dataset("FOLDER", "x.npy")),
    "lmdb": (make_lmdb, read_dataset("FOLDER", "x.lmdb")), "ffhq": (make_ffhq, read_dataset("FFHQ")),
    "cifar": (make_cifar, read_dataset("CIFAR10", side=32)), "imagenet": (make_imagenet, read_dataset("IMAGENET32")),
    "celeba": (make_celeba, read_dataset("CELEBA")), "pack": (make_pack, read_dataset("ZIP", "x.zip", "mmap")),
    "tool": (make_any, read_by_tool), "arguments": (lambda folder, rng: [], read_arguments),
}
