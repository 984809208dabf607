"""The run folder exp/logs/DOC: its files, its lock, and full training states that survive anything."""

import logging
import os
import re
import shutil
import time
from pathlib import Path

import torch

from configs.schema import Config, load_config, save_config
from utils.atomic import atomic_path, atomic_write
from utils.errors import DataError, UserError
from utils.safe_load import load_torch

log = logging.getLogger(__name__)
FORMAT_VERSION = 1


class RunFolder:
    """Paths below exp/logs/DOC, and which checkpoint is the newest.

        config.yml  ckpt.pth  ckpt_{epoch}.pth  model_{epoch}_ema.pth  metrics.jsonl  stdout.txt  samples/  tensorboard/
    """

    def __init__(self, path: str | Path, datasets: str | Path = "exp/datasets"):
        self.path = Path(path)
        self.datasets = Path(datasets)           # where the data sets of its training lie

    @property
    def config(self) -> Path:
        return self.path / "config.yml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def full_states(self) -> list[Path]:
        """Checkpoints to resume from, newest first: ckpt.pth, then by falling epoch."""
        return [p for p in [self.path / "ckpt.pth"] if p.exists()] + _by_epoch(self.path, r"ckpt_(\d+)\.pth")

    def weights(self, ckpt_id: int | None = None, ema: bool = True) -> Path:
        """The file to sample from.

        Args:
            ckpt_id: Epoch; none: the newest.
            ema: model_{epoch}_ema.pth is preferred; raw weights are only in the full states.

        Raises:
            UserError: There is none; lists the epochs that exist.
        """
        averages = _by_epoch(self.path, r"model_(\d+)_ema\.pth") if ema else []
        candidates = [*self.full_states(), *averages]
        if ckpt_id is not None:
            candidates = [p for p in [*averages, *self.full_states()] if re.search(rf"_{ckpt_id}(_ema)?\.pth$", p.name)]
        if candidates:
            return candidates[0]
        known = sorted({int(n) for p in [*self.full_states(), *_by_epoch(self.path, r"model_(\d+)_ema\.pth")]
                        for n in re.findall(r"\d+", p.name)})
        wanted = "no checkpoint" if ckpt_id is None else f"no checkpoint {ckpt_id}"
        raise UserError(f"{wanted} in {self.path}; " + (f"there are: {', '.join(map(str, known))}" if known else
                        "train first, or name a file with --weights"))

    def prepare(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        """Make the folder ready for a run and write its config.yml.

        Raises:
            UserError: It already holds checkpoints and neither flag is given, or resuming would change the network,
                the data or the process.
        """
        self.check(config, resume=resume, overwrite=overwrite)
        if self.full_states() and overwrite:
            backup = self.path.with_name(f"{self.path.name}.bak-{time.strftime('%Y%m%d-%H%M%S')}")
            os.rename(self.path, backup)
            log.info("%s moved to %s", self.path, backup)
        if resume and not self.full_states():
            log.info("%s holds no checkpoint yet: starting fresh", self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        save_config(config, self.config)

    def check(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        """The refusals of ``prepare``, without changing anything."""
        if resume and overwrite:
            raise UserError("--resume_training and --overwrite exclude each other")
        if self.full_states() and not (resume or overwrite):
            raise UserError(f"{self.path} already holds checkpoints; continue with --resume_training, "
                            "or start anew with --overwrite (the old folder is kept under another name)")
        if resume and self.full_states() and self.config.exists():
            refuse_differences(load_config(self.config), config, self.config)

    def load_newest(self) -> tuple[dict, Path] | None:
        """The newest full state that is whole; broken ones are named in a warning and passed over.

        Raises:
            DataError: There are checkpoints, and none can be read.
        """
        states = self.full_states()
        for path in states:
            try:
                state = load_torch(path)
                if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
                    raise DataError(f"{path}: not a full state of this program; use --init_from for foreign weights")
                return state, path
            except DataError as error:
                log.warning("%s; trying the one before", error)
        if states:
            raise DataError(f"{self.path}: none of the {len(states)} checkpoints can be read; --overwrite starts anew")
        return None

    def save_newest(self, state: dict) -> Path:
        atomic_write(self.path / "ckpt.pth", lambda file: torch.save(state, file))
        return self.path / "ckpt.pth"

    def save_epoch(self, state: dict, epoch: int) -> Path:
        """ckpt_{epoch}.pth, the same bytes as ckpt.pth, and model_{epoch}_ema.pth."""
        path = self.path / f"ckpt_{epoch}.pth"
        atomic_write(path, lambda file: torch.save(state, file))
        with atomic_path(self.path / "ckpt.pth") as temporary:
            shutil.copyfile(path, temporary)
        if state["ema"] is not None:
            atomic_write(self.path / f"model_{epoch}_ema.pth", lambda file: torch.save(state["ema"], file))
        return path


def refuse_differences(stored: Config, given: Config, where: Path, sections=("data", "model", "diffusion")) -> None:
    """UserError that lists the keys in which two configurations describe different networks, data or processes."""
    different = [f"{section}.{key} is {old!r} there, {new!r} here" for section in sections
                 for key, old in getattr(stored, section)
                 if old != (new := getattr(getattr(given, section), key)) and (section, key) not in HARMLESS]
    if different:
        raise UserError(f"{where} contradicts the given configuration: {'; '.join(different)}")


# How data are found and fed, and how the average is made, may change between training and use.
HARMLESS = {("data", "root"), ("data", "num_workers"), ("data", "cache"), ("data", "skip_bad"),
            ("data", "validation_fraction"), ("data", "random_flip"), ("model", "dropout"), ("model", "ema"),
            ("model", "ema_rate"), ("model", "ema_warmup"), ("model", "var_type")}


def _by_epoch(folder: Path, pattern: str) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [(int(match[1]), p) for p in folder.iterdir() if (match := re.fullmatch(pattern, p.name))]
    return [p for _, p in sorted(found, reverse=True)]
