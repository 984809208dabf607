"""Weights, training states and folders of models that are fuzzed; see ``fuzz_kinds``."""

import argparse
import io
import json
import random
from functools import cache
from pathlib import Path

import yaml

from benchmarks.fuzz_data import SIDE, TINY, tiny_model, write


def saved(content, legacy: bool = False) -> bytes:
    import torch

    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


@cache
def weight_seeds() -> dict[str, bytes]:
    """A checkpoint of each program, by file name."""
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
    return {f"{'old/' if legacy else ''}{name}": saved(content, legacy) for legacy in (False, True)
            for name, content in contents.items()}


def make_weights(folder: Path, rng: random.Random) -> list[str]:
    name = rng.choice(list(weight_seeds()))
    return write(folder, {name: weight_seeds()[name]})


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


@cache
def adm_network():
    from configs.schema import Config
    from models import build_model

    model = {"arch": "adm", "num_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 1],
             "attention_resolutions": [4], "num_heads": 1, "num_classes": 2, "learn_sigma": True}
    loss = {"variational": "hybrid", "reduce": "mean"}
    return build_model(Config.model_validate({**TINY, "model": model, "loss": loss}))


@cache
def adm_seeds() -> dict[str, bytes]:
    """Files of guided-diffusion's family: a network and a noisy classifier."""
    from models.adm_classifier import ADMClassifier

    classifier = ADMClassifier(image_size=SIDE, in_channels=3, num_channels=64, num_res_blocks=1, channel_mult=(1, 1),
                               attention_resolutions=(4,), num_outputs=2)
    return {name: saved(network.state_dict(), legacy) for legacy in (False, True)
            for name, network in ((f"ema_0.9999_00001{legacy:d}.pt", adm_network()),
                                  (f"classifier{legacy:d}.pt", classifier))}


def make_adm(folder: Path, rng) -> list[str]:
    name = rng.choice(list(adm_seeds()))
    return write(folder, {name: adm_seeds()[name]})


def read_adm(folder: Path, rng) -> None:
    import torch

    from models import load_weights
    from runners.sampling.classifier import Classifier

    for path in folder.iterdir():
        if path.name.startswith("ema"):
            load_weights(adm_network(), path)
        else:
            Classifier(path, (3, SIDE, SIDE))(torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1))


@cache
def state_config():
    from configs.schema import Config

    return Config.model_validate({**TINY, "training": {"batch_size": 2, "ema": [{"rate": 0.9}, {"half_life": 100}],
                                                       "time_sampler": "loss_second_moment"}})


def training_state():
    from models import build_model
    from runners.training.state import TrainingState

    return TrainingState(build_model(state_config()), state_config(), total_steps=10)


def one_step(state) -> None:
    """Of an optimizer whose moments a damaged file may have brought."""
    import torch

    for parameter in state.parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    state.optimizer.step()


@cache
def state_seeds() -> dict[str, bytes]:
    """Full states with an optimizer's moments: of this program, SA-DPM and DDIM."""
    import torch

    torch.manual_seed(0)
    state = training_state()
    one_step(state)
    own = {"format_version": 1, "config": state_config().model_dump(mode="json"), "step": 1, "epoch": 0,
           "best_fid": {"fid": 3.5, "step": 1, "snapshot": 1}, "metric_sums": [[1.0, 2.0]], "snapshots": [1],
           "data_fingerprint": "0" * 16, "data_content": "0" * 16, "amp": "off", **state.state_dict()}
    weights, optimizer = own["model"], own["optimizer"]
    averaged = {i: {**slots, "ema": tensor} for (i, slots), tensor in zip(optimizer["state"].items(),
                                                                          weights.values(), strict=True)}
    sa_dpm = {"model_dict": weights, "epoch": 3, "step": 1, "config": argparse.Namespace(a=1),
              "optimizer": {**optimizer, "state": averaged}}
    contents = {"ours": own, "sa_dpm": sa_dpm, "ddim": [weights, optimizer, 3, 1, weights]}
    return {f"{name}{legacy:d}": saved(content, legacy) for name, content in contents.items()
            for legacy in (False, True)}


def make_state(folder: Path, rng) -> list[str]:
    return write(folder, {"ckpt.pth": rng.choice(list(state_seeds().values()))})


def read_state(folder: Path, rng) -> None:
    from runners.training.checkpoint import RunFolder
    from runners.training.resuming import Judge

    state = training_state()
    found = RunFolder(folder).load_newest(Judge(state.model, state_config()))
    if found:
        state.load_state_dict(found[0])
        one_step(state)


@cache
def average_seeds() -> dict[str, bytes]:
    weights = tiny_model().state_dict()
    return {f"phema_{step}_{length:.3f}.pth": saved({"step": step, "length": length, "weights": weights})
            for step in (1, 2) for length in (0.05, 0.1)}


def read_averages(folder: Path, rng) -> None:
    from models import load_profile
    from runners.training.checkpoint import RunFolder

    load_profile(tiny_model(), RunFolder(folder).profiles(), 0.07)


@cache
def edm_state() -> bytes:
    """A training state of EDM: a network in its objects, and Adam's state."""
    from models.song import SongUNet
    from tests import edm_writer

    network = {"model_channels": 32, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    made = SongUNet(img_resolution=SIDE, in_channels=3, out_channels=3, **network)
    arguments = {"img_resolution": SIDE, "img_channels": 3, "model_type": "SongUNet", **network}
    return edm_writer.torch_save({"net": edm_writer.network(made, "EDMPrecond", arguments), "optimizer_state": {
        "state": {i: {"step": 1, "exp_avg": each.detach()} for i, each in enumerate(made.parameters())},
        "param_groups": []}})


def read_edm_state(folder: Path, rng) -> None:
    from models import build_model, load_weights
    from runners.sampling.weights import stored_config

    path = folder / "training-state-000001.pt"
    config = stored_config(path)
    if config:
        load_weights(build_model(config), path)


MODEL_KINDS = {
    "weights": (make_weights, read_weights), "snapshot": (make_snapshot, read_snapshot),
    "run": (make_run, read_run), "adm": (make_adm, read_adm),
    "state": (make_state, read_state),
    "averages": (lambda folder, rng: write(folder, average_seeds()), read_averages),
    "edm_state": (lambda folder, rng: write(folder, {"training-state-000001.pt": edm_state()}), read_edm_state),
}
