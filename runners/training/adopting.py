"""Runs of other programs, gone on from: their full states in this program's form."""

import logging
import os
import shutil
import time
from pathlib import Path

import torch
from torch import nn

from configs.schema import Config
from models.formats.full_states import FullState, read_full_state
from utils.atomic import atomic_write

log = logging.getLogger(__name__)
FORMAT_VERSION = 1


def is_ours(content) -> bool:
    return isinstance(content, dict) and content.get("format_version") == FORMAT_VERSION and "step" in content


def adopt(content, path: Path, model: nn.Module, config: Config) -> dict:
    """A full state of this program with the weights, average, moments and step of any program's.

    The times, the order of the images and the learning rate go on where this program would be after so many steps.

    Raises:
        DataError: No full state in a known form.
    """
    full = read_full_state(path, content)
    places = {name: index for index, (name, _) in enumerate(model.named_parameters())}
    return {
        "format_version": FORMAT_VERSION, "config": config.model_dump(mode="json"),
        "adopted": what_was_taken(full, path), "step": full.step, "epoch": full.epoch or 0,
        "best_fid": None, "metric_sums": None, "snapshots": [],
        "model": _as_float(full.weights), "ema": full.averages and _as_float(full.averages),
        "ema_updates": full.step, "more_averages": {}, "times": {}, "lr_schedule": {"last_epoch": full.step},
        "optimizer": {"state": {places.get(name, name): kept for name, kept in full.moments.items()},
                      "param_groups": []},
        "grad_scaler": {}, "bad_run": 0,
    }


def _as_float(state: dict) -> dict:
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def what_was_taken(full: FullState, path: Path) -> str:
    kept = sorted({key for each in full.moments.values() for key in each if key != "step"})
    epoch = "" if full.epoch is None else f", epoch {full.epoch}"
    return (f"{path} ({full.program}): step {full.step}{epoch}; {len(full.weights)} weights, "
            f"{'their EMA' if full.averages else 'no EMA (it starts from the weights)'}, "
            f"{'the moments ' + ' and '.join(kept) if kept else 'no moments (they start from zero)'}")


def take_over(folder: Path, state: dict) -> None:
    """Make the folder of another program a run of this one: a backup beside it, then ckpt.pth in our form."""
    backup = folder.with_name(f"{folder.name}.bak-{time.strftime('%Y%m%d-%H%M%S')}")
    shutil.copytree(folder, backup, copy_function=_link_or_copy)
    atomic_write(folder / "ckpt.pth", lambda file: torch.save(state, file))
    log.info("made %s a run of this program; the folder as it was: %s", folder, backup)
    log.info("took over %s", state["adopted"])


def _link_or_copy(source: str, target: str) -> None:
    """Weights are only ever replaced, never changed in place, so that a second name of the file keeps them."""
    try:
        if not source.endswith(".pth"):
            raise OSError
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
