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
from unittest.mock import patch

import numpy as np
import yaml

from benchmarks.fuzz_data import DATA_KINDS, SIDE, TINY, noise, write

DIM = 16                    # features of the statistics, 2,048 in earnest


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


def make_snapshot(folder: Path, rng) -> list[str]:
    golden = Path(__file__).parents[1] / "tests/golden/edm_snapshot_nosource.pkl"
    return write(folder, {"network-snapshot-1.pkl": golden.read_bytes()})


def read_snapshot(folder: Path, rng) -> None:
    from models.weights import about_weights, stored_settings

    path = folder / "network-snapshot-1.pkl"
    stored_settings(path)
    about_weights(path)


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
    metrics = "".join(json.dumps({"step": i, "loss": 1.0, "loss_base": 1.0, "validation_loss": 1.0}) + "\n"
                      for i in range(30))
    return write(folder, {"config.yml": yaml.safe_dump(TINY), "ckpt.pth": weight_seeds()["ckpt.pth"],
                          "ckpt_1.pth": weight_seeds()["ckpt.pth"], "metrics.jsonl": metrics})


def read_run(folder: Path, rng) -> None:
    from configs.schema import load_config
    from runners.diagnosis.verdict import verdict
    from runners.training.checkpoint import RunFolder
    from runners.training.metrics_file import read_metrics

    run = RunFolder(folder)
    norms = [{"evaluation": "first", "t": float(t), "ratio": 1.01, "ratio_error": 0.001} for t in range(4)]
    verdict(load_config(run.config), read_metrics(run.metrics), None, True, norms)
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


def make_gamma(folder: Path, rng) -> list[str]:
    return write(folder, {"g.json": json.dumps({"format": "gamma 1", "times": [0, 10, 20], "gamma": [0.5, 0.8, 0.9],
                                                "pixels": 2, "weights": "0" * 16})})


def read_gamma(folder: Path, rng) -> None:
    from runners.sampling.gamma import read_gamma
    from runners.sampling.sampler import check_gamma

    check_gamma(read_gamma(folder / "g.json"), [0, 10])


def make_samples(folder: Path, rng) -> list[str]:
    """An archive of samples, or the rows that a killed job has left."""
    contents = {name: io.BytesIO() for name in ("rows", "done", "npz")}
    np.save(contents["rows"], noise())
    np.save(contents["done"], np.ones(4, np.uint8))
    np.savez(contents["npz"], arr_0=noise())
    names = {"rows": f".samples_4x{SIDE}x{SIDE}x3.npy", "done": f".samples_4x{SIDE}x{SIDE}x3.done.npy",
             "npz": f"samples_4x{SIDE}x{SIDE}x3.npz"}
    chosen = rng.choice((("rows", "done"), ("npz",)))
    return write(folder, {f"images/{names[key]}": contents[key].getvalue() for key in chosen})


def read_samples(folder: Path, rng) -> None:
    from runners.sampling.writers import NpzWriter

    writer = NpzWriter(folder / "images", 4, (3, SIDE, SIDE))
    writer.has(0, [0, 1])
    writer.read(0, [0, 1, 2, 3])
    writer.close()


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

    with patch.object(references, "DIM", DIM):               # the suite runs this within its own process
        for path in folder.iterdir():
            reference = references.load_reference(path)
            if reference.features is not None:
                reference.features.mean()


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
    "weights": (make_weights, read_weights), "snapshot": (make_snapshot, read_snapshot),
    "diffusers": (make_diffusers, read_diffusers), "run": (make_run, read_run),
    "yaml": (make_yaml, read_yaml), "study": (make_study, read_study), "log": (make_log, read_log),
    "gamma": (make_gamma, read_gamma), "samples": (make_samples, read_samples),
    "manifest": (make_manifest, read_manifest), "statistics": (make_statistics, read_statistics),
    **DATA_KINDS, "arguments": (lambda folder, rng: [], read_arguments),
}
