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

from benchmarks.fuzz_data import DATA_KINDS, SIDE, noise, write
from benchmarks.fuzz_models import MODEL_KINDS
from benchmarks.fuzz_pipelines import PIPELINE_KINDS

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


def read_pickle(folder: Path, rng) -> None:
    from utils.safe_load import load_pickle

    load_pickle(folder / "x.npy")


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


def make_prompts(folder: Path, rng) -> list[str]:
    return write(folder, {"p.txt": "a red square\n\na bl\u00fce square\r\na green square"})


def read_prompt_file(folder: Path, rng) -> None:
    from runners.sampling.prompts import read_prompts

    for prompt in read_prompts(folder / "p.txt"):
        prompt.encode()


def make_command(folder: Path, rng) -> list[str]:
    """A published training or sampling command of guided-diffusion's family, as a text."""
    flags = ("--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True --dropout 0.1 --batch_size 8 "
             "--diffusion_steps 4000 --noise_schedule cosine --use_fp16 True --channel_mult 1,2,3,4 --ema_rate 0.9999")
    words = rng.choice(("image_train.py --data_dir data --schedule_sampler loss-second-moment --lr 1e-4 --input_pertub "
                        "0.1", "image_sample.py --model_path ema.pt --timestep_respacing ddim25 --use_ddim True"))
    return write(folder, {"c.txt": f"mpiexec -n 2 python scripts/{words} {flags}"})


def read_command(folder: Path, rng) -> None:
    from configs.from_adm import convert
    from utils.files import MIB, read_regular

    convert(read_regular(folder / "c.txt", MIB).decode(errors="surrogateescape"))


def make_cells(folder: Path, rng) -> list[str]:
    """What a study leaves: its description and the lines of a run."""
    entry = {"study": {"run": "plain", "seed": 1, "images_seen": 64, "settings": {"timesteps": 10, "eta": 1.0}},
             "fid": 3.5, "name": "FID-500", "seconds": 1.0, "sampling_seconds": 0.5, "reference_fingerprint": "0" * 16,
             "fid_interval": [3.0, 4.0], "network_calls": 10}
    shipped = next((Path(__file__).parents[1] / "configs/studies").glob("*.yml"))
    return write(folder, {"cells/plain-1.jsonl": 2 * (json.dumps(entry) + "\n"), "study.yml": shipped.read_bytes()})


def read_study_folder(folder: Path, rng) -> None:
    from configs.study import load_study
    from runners.study.grid import prepare_cells, read_cells

    for entry in read_cells(folder / "cells").values():
        f"{entry.get('fid', 0):.2f} {entry['seconds']:.0f} {entry['network_calls']} {entry['reference_fingerprint']}"
    prepare_cells(folder / "cells/plain-1.jsonl")
    load_study(folder / "study.yml")


def make_parts(folder: Path, rng) -> list[str]:
    """Batches of a likelihood that a stopped diagnosis has left."""
    file = io.BytesIO()
    rng.choice((np.savez, np.savez_compressed))(file, sums=np.ones((3, 2)), squares=np.ones((3, 2)),
                                                total=np.ones(4), prior=np.ones(4))
    return write(folder, {f"nll.parts/00000{i}.npz": file.getvalue() for i in range(2)})


def read_parts(folder: Path, rng) -> None:
    from runners.diagnosis.likelihood import merged

    merged(sorted((folder / "nll.parts").iterdir()), [0, 1])


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
    **MODEL_KINDS, **PIPELINE_KINDS,
    "yaml": (make_yaml, read_yaml), "study": (make_study, read_study), "log": (make_log, read_log),
    "gamma": (make_gamma, read_gamma), "samples": (make_samples, read_samples),
    "manifest": (make_manifest, read_manifest), "statistics": (make_statistics, read_statistics),
    "prompts": (make_prompts, read_prompt_file), "command": (make_command, read_command),
    "cells": (make_cells, read_study_folder), "parts": (make_parts, read_parts),
    **DATA_KINDS, "arguments": (lambda folder, rng: [], read_arguments),
}
