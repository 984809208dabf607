"""The run folder exp/logs/DOC: its files, its lock, and full training states that survive anything."""

import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from configs.networks import Network
from configs.schema import Config, load_config, save_config
from runners import distributed
from utils.atomic import atomic_path, atomic_write, remove_leftovers
from utils.errors import DataError, DivergedError, SaveError, UserError
from utils.locks import lock_folder
from utils.safe_load import load_torch

log = logging.getLogger(__name__)
FORMAT_VERSION = 1


class RunFolder:
    """Paths below exp/logs/DOC, and which checkpoint is the newest.

        config.yml  ckpt.pth  ckpt_{epoch}.pth  model_{epoch}_ema.pth  phema_{epoch}_{length}.pth
        metrics.jsonl  stdout.txt  samples/  tensorboard/
    """

    def __init__(self, path: str | Path, datasets: str | Path = "exp/datasets", comment: str = ""):
        self.path = Path(path)
        self.datasets = Path(datasets)           # where the data sets of its training lie
        self.comment = comment                   # for the log
        self._loaded = None                      # what ``prepare`` has read for ``load_newest``

    @property
    def config(self) -> Path:
        return self.path / "config.yml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def full_states(self) -> list[Path]:
        """Checkpoints to resume from, newest first: ckpt.pth, then by falling epoch."""
        return [p for p in [self.path / "ckpt.pth"] if p.exists()] + _by_epoch(self.path, r"ckpt_(\d+)\.pth")

    def averages(self) -> list[Path]:
        """model_{epoch}_ema.pth by falling epoch."""
        return _by_epoch(self.path, r"model_(\d+)_ema\.pth")

    def profiles(self, ckpt_id: int | None = None) -> list[Path]:
        """phema_{epoch}_{length}.pth up to epoch ``ckpt_id``, the newest last.

        Raises:
            UserError: There are none.
        """
        files = [p for p in _by_epoch(self.path, r"phema_(\d+)_\d\.\d+\.pth")[::-1]
                 if ckpt_id is None or _epoch(p) <= ckpt_id]
        if not files:
            raise UserError(f"{self.path} has kept no power-function averages; train with training.ema "
                            "[{length: 0.05}, {length: 0.1}]")
        return files

    def weights(self, ckpt_id: int | None = None, ema: bool = True) -> Path:
        """The file to sample from.

        Args:
            ckpt_id: Epoch; none: the newest.
            ema: model_{epoch}_ema.pth is preferred; raw weights are only in the full states.

        Raises:
            UserError: There is none; lists the epochs that exist.
        """
        candidates = [*(self.averages() if ema else []), *self.full_states()]
        if ckpt_id is not None:
            candidates = [p for p in candidates if _epoch(p) == ckpt_id]
        if candidates:
            return max(candidates, key=_epoch)               # the first of equals; ckpt.pth is newer than all
        known = sorted({_epoch(p) for p in [*self.full_states(), *self.averages()] if p.name != "ckpt.pth"})
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
        if overwrite and (self.full_states() or self.averages()):
            backup = self.path.with_name(f"{self.path.name}.bak-{time.strftime('%Y%m%d-%H%M%S')}")
            os.rename(self.path, backup)
            log.info("%s moved to %s", self.path, backup)
        self._loaded = self.load_newest() if resume else None      # before anything is changed
        if resume and not self._loaded:
            log.info("%s holds no checkpoint yet: starting fresh", self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        save_config(config, self.config)

    def check(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        """The refusals of ``prepare``, without changing anything."""
        if resume and overwrite:
            raise UserError("--resume_training and --overwrite exclude each other")
        if (self.full_states() or self.averages()) and not (resume or overwrite):
            raise UserError(f"{self.path} already holds checkpoints; continue with --resume_training, "
                            "or start anew with --overwrite (the old folder is kept under another name)")
        if resume and self.averages() and not self.full_states():
            raise UserError(f"{self.path} holds weights but no full state to resume from; start another --doc with "
                            f"--init_from {self.averages()[0]}")
        if resume and self.full_states() and self.config.exists():
            stored = load_config(self.config)
            refuse_differences(stored, config, self.config, DECIDE_A_RUN)
            for line in differences(stored, config, {"training": None, "optim": None}):
                log.warning("resuming with another setting: %s", line)

    def load_newest(self) -> tuple[dict, Path] | None:
        """The newest full state that is whole; broken ones are named in a warning and passed over.

        Raises:
            DataError: There are checkpoints, and none can be read.
        """
        if self._loaded:
            found, self._loaded = self._loaded, None
            return found
        states = self.full_states()
        for path in states:
            try:
                state = load_torch(path)
                if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION or "step" not in state:
                    raise UserError(f"{path} is not a full state of this program; start another --doc with "
                                    f"--init_from {path}")
                return state, path
            except DataError as error:
                log.warning("%s; trying the one before", error)
        if states:
            raise DataError(f"{self.path}: none of the {len(states)} checkpoints can be read; --overwrite starts anew")
        return None


@contextmanager
def prepared(run: RunFolder, config: Config, *, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """Hold the lock of the run's folder and make it ready for ``config``. Collective: rank 0 does it.

    Raises:
        UserError: Another job holds it, or see ``RunFolder.prepare``.
    """
    with ExitStack() as held:
        distributed.on_rank_zero(lambda: held.enter_context(lock_folder(run.path)))
        distributed.on_rank_zero(lambda: run.prepare(config, resume=resume, overwrite=overwrite))
        yield run


class CheckpointWriter:
    """Writes states from a background thread, one at a time.

    A write that fails (a full disk) leaves the old files whole; it is logged, and training goes on. Files are written
    by rank 0; on the other ranks nothing happens.

    Args:
        run: Where to.
        keep_last, keep_every: Retention, see training.keep_last. Only snapshots that this run wrote are ever removed.
        snapshots: Epochs of the snapshots that this run has written so far.
    """

    def __init__(self, run: RunFolder, keep_last: int | None, keep_every: int | None, snapshots: list[int]):
        self.run, self.keep_last, self.keep_every = run, keep_last, keep_every
        self.snapshots, self.failure = snapshots, None
        self._thread, self._pending = ThreadPoolExecutor(1), None

    def save(self, state: dict, epoch: int | None = None) -> None:
        """Write ckpt.pth; with ``epoch`` also ckpt_{epoch}.pth and model_{epoch}_ema.pth."""
        self._wait()
        if epoch is not None and epoch not in self.snapshots:
            self.snapshots.append(epoch)
        state = to_host({**state, "snapshots": list(self.snapshots)})
        self._pending = self._thread.submit(self._write, state, epoch)

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self._thread.shutdown()                              # whatever happened, a write under way is finished

    def close(self) -> None:
        """Wait for the last write.

        Raises:
            SaveError: It failed.
        """
        self._wait()
        if self.failure:
            raise SaveError(f"the last checkpoint could not be saved: {self.failure}; free some space and resume")

    def _wait(self) -> None:
        if self._pending:
            self._pending.result()

    def _write(self, state: dict, epoch: int | None) -> None:
        try:
            path = self.run.path / "ckpt.pth"
            if epoch is None:
                atomic_write(path, lambda file: torch.save(state, file))
            else:                                            # ckpt.pth last: a kill in between costs no snapshot
                if state["ema"] is not None:
                    average = self.run.path / f"model_{epoch}_ema.pth"
                    atomic_write(average, lambda file: torch.save(state["ema"], file))
                self._write_profiles(state, epoch)
                snapshot = self.run.path / f"ckpt_{epoch}.pth"
                atomic_write(snapshot, lambda file: torch.save(state, file))
                with atomic_path(path) as temporary:
                    shutil.copyfile(snapshot, temporary)
                self._remove_old(state["best_fid"])
            self.failure = None
            log.info("saved %s at step %d", path, state["step"])
        except (OSError, RuntimeError) as error:             # torch.save turns a full disk into a RuntimeError
            self.failure = error
            log.error("SAVING FAILED, training goes on with the old checkpoint: %s", error)

    def _write_profiles(self, state: dict, epoch: int) -> None:
        """phema_{epoch}_{length}.pth for each power-function average: what ``--ema_length`` makes others from."""
        averages = [state["ema"], *state["more_averages"].values()]
        for kind, average in zip(state["config"]["training"]["ema"], averages, strict=False):
            if kind["length"] is not None:
                content = {"step": state["step"], "length": kind["length"], "weights": average}
                path = self.run.path / f"phema_{epoch}_{kind['length']:.3f}.pth"
                atomic_write(path, lambda file, content=content: torch.save(content, file))

    def _remove_old(self, best: dict | None) -> None:
        if self.keep_last is None:
            return
        for epoch in self.snapshots[:-self.keep_last]:
            if epoch != (best and best["snapshot"]) and not (self.keep_every and epoch % self.keep_every == 0):
                self.snapshots.remove(epoch)
                for name in (f"ckpt_{epoch}.pth", f"model_{epoch}_ema.pth"):
                    (self.run.path / name).unlink(missing_ok=True)


def to_host(value):
    """A copy on the CPU of nested dictionaries and lists of tensors, which later steps cannot change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_host(item) for key, item in value.items()}
    return [to_host(item) for item in value] if isinstance(value, list) else value


def refuse_non_finite(state: dict) -> None:
    """DivergedError if a weight, an average or a moment is not finite."""
    moments = {f"{index} {name}": value for index, slots in state["optimizer"]["state"].items()
               for name, value in slots.items() if isinstance(value, torch.Tensor)}
    for kind, tensors in (("model weight", state["model"]), ("ema weight", state["ema"]), ("optimizer state", moments),
                          *((f"average ({name})", each) for name, each in state["more_averages"].items())):
        for name, tensor in (tensors or {}).items():
            if not torch.isfinite(tensor).all():
                raise DivergedError(f"{kind} {name} is not finite at step {state['step']}; nothing is saved, the last "
                                    "checkpoint is kept. Lower optim.lr, or set optim.grad_clip")


# What makes two configurations the same network on the same images; None: every key of the section counts.
# How data are found, fed and mirrored, and how the average is made, may change between training and use.
DECIDE_IMAGES = {
    "data": ("dataset", "image_size", "channels", "category", "rescaled", "logit_transform", "uniform_dequantization",
             "gaussian_dequantization"),
    "model": None,
    "diffusion": None,
}
# What a run keeps when it is resumed.
DECIDE_A_RUN = {**DECIDE_IMAGES, "loss": None, "optim": ("optimizer", "amsgrad")}


def differences(stored: Config, given: Config, sections: dict) -> list[str]:
    found = []
    for section, keys in sections.items():
        old, new = (_plain(getattr(config, section)) for config in (stored, given))
        found += [f"{section}.{key} is {old.get(key)!r} there, {new.get(key)!r} here" for key in {**old, **new}
                  if (keys is None or key in keys) and old.get(key) != new.get(key)]
    return found


def _plain(section) -> dict:
    """Keys and values; of ``model`` those that decide what the weights compute."""
    return section.essence() if isinstance(section, Network) else dict(section)


def refuse_differences(stored: Config, given: Config, where: Path, sections: dict = DECIDE_IMAGES) -> None:
    """UserError that lists the keys in which two configurations contradict each other."""
    found = differences(stored, given, sections)
    if found:
        raise UserError(f"{where} contradicts the given configuration: {'; '.join(found)}")


def _epoch(path: Path) -> float:
    """The number in a checkpoint's name; infinite for ckpt.pth."""
    number = re.search(r"\d+", path.name)
    return int(number[0]) if number else float("inf")


def _by_epoch(folder: Path, pattern: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if re.fullmatch(pattern, p.name)), key=_epoch, reverse=True)
