"""This program's checkpoints, and bare state dicts."""

import re
from pathlib import Path

from models.formats.common import StoredWeights, bare, count

EMA_FILE = re.compile(r"model_(\d+)_ema\.pth")


def is_ours(content) -> bool:
    return isinstance(content, dict) and {"format_version", "model"} <= content.keys()


def read_ours(path: Path, content: dict, ema: bool) -> StoredWeights:
    """``{"format_version", "config", "step", "epoch", "model", "ema": state dict or None, ...}``"""
    kind, key = ("ema", "ema") if ema and content.get("ema") else ("raw", "model")
    return StoredWeights(bare(content[key], path, f'entry "{key}"'), kind,
                         count(content.get("step")), count(content.get("epoch")))


def read_ema_file(path: Path, content: dict, ema: bool) -> StoredWeights:
    epoch = int(EMA_FILE.fullmatch(path.name)[1])
    return StoredWeights(bare(content, path, "content"), "ema", epoch=epoch)


def read_bare(path: Path, content: dict, ema: bool) -> StoredWeights:
    return StoredWeights(bare(content, path, "content"))
