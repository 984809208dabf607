"""The run folder exp/logs/DOC: its files, its lock, and what may continue in it."""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from configs.network import Network
from configs.schema import Config, load_config, save_config
from runners import distributed
from runners.training.adopting import is_ours, take_over
from utils.atomic import remove_leftovers
from utils.errors import DataError, UserError
from utils.locks import lock_folder
from utils.safe_load import load_torch

log = logging.getLogger(__name__)


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
        wanted = "no checkpoint" if ckpt_id is None else f"no checkpoint {ckpt_id} (--ckpt_id or sampling.ckpt_id)"
        there = [f"there are: {', '.join(map(str, known))}"] if known else []
        if ckpt_id is not None and self.full_states():
            there.append("without --ckpt_id, --sampling.ckpt_id null takes the newest")
        raise UserError(f"{wanted} in {self.path}; " + ("; ".join(there) or "train first, or name a file with "
                                                        "--weights"))

    def prepare(self, config: Config, *, resume: bool, overwrite: bool, judge: Callable | None = None) -> None:
        """Make the folder ready for a run and write its config.yml.

        Args:
            judge: Refuses a state that cannot be gone on from; see ``runners.training.resuming.Judge``.

        Raises:
            UserError: It already holds checkpoints and neither flag is given, or resuming would change the network,
                the data or the process.
        """
        self.check(config, resume=resume, overwrite=overwrite)
        if resume and self.full_states() and self.config.exists():
            for line in differences(load_config(self.config), config, MAY_CHANGE):
                log.warning("resuming with another setting: %s", line)
        if overwrite and (self.full_states() or self.averages()):
            backup = self.path.with_name(f"{self.path.name}.bak-{time.strftime('%Y%m%d-%H%M%S')}")
            os.rename(self.path, backup)
            log.info("%s moved to %s", self.path, backup)
        found = self.load_newest(judge) if resume else None         # before anything is changed
        self._loaded = found if judge else None                     # one that nobody has judged is read again
        if resume and not found:
            log.info("%s holds no checkpoint yet: starting fresh", self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        remove_leftovers(self.path / "samples")
        if found and "adopted" in found[0]:
            take_over(self.path, found[0])
        save_config(config, self.config)

    def check(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        """The refusals of ``prepare``, without changing anything."""
        if resume and overwrite:
            raise UserError("--resume_training and --overwrite exclude each other")
        if (self.full_states() or self.averages()) and not (resume or overwrite):
            raise UserError(f"{self.path} already holds checkpoints; continue with --resume_training, or start anew "
                            "with --overwrite (the old folder is kept under another name); in Python resume=True and "
                            "overwrite=True")
        inner = overwrite and sorted(self.path.glob("*/config.yml"))
        if inner and (self.full_states() or self.averages()):
            raise UserError(f"{self.path} also holds runs of a study, such as {inner[0].parent.name}, which "
                            "--overwrite would move away; choose another --doc")
        loose = self.averages() or _by_epoch(self.path, r"training-state-(\d+)\.pt")                    # EDM's
        if resume and loose and not self.full_states():
            raise UserError(f"{self.path} holds weights but no full state to resume from; start another --doc with "
                            f"--init_from {loose[0]}")
        if resume and self.full_states() and self.config.exists():
            stored = load_config(self.config)
            refuse_differences(stored, config, self.config, DECIDE_A_RUN if self._is_ours() else DECIDE_ADOPTION)

    def _is_ours(self) -> bool:
        """Whether this program wrote the folder's configuration: the others keep the loss on their command line."""
        return any(line.startswith("loss:") for line in self.config.read_text(errors="replace").splitlines())

    def load_newest(self, judge: Callable | None = None) -> tuple[dict, Path] | None:
        """The newest full state that is whole; broken ones are named in a warning and passed over.

        Args:
            judge: ``judge(content, path)`` gives the state to go on from, DataError where that is not possible.

        Raises:
            DataError: There are checkpoints, and none can be used; gives the reason for the newest.
        """
        if self._loaded:
            found, self._loaded = self._loaded, None
            return found
        states, reasons = self.full_states(), []
        for path in states:
            try:
                state = load_torch(path)
                if judge:
                    state = judge(state, path)
                elif not is_ours(state):
                    raise DataError(f"{path} is not a full state of this program")
                return state, path
            except DataError as error:
                reasons.append(str(error))
                if len(reasons) < len(states):
                    log.warning("%s; trying the one before", error)
        if states:
            raise DataError(f"{self.path}: none of the {len(states)} checkpoints can be used; --overwrite starts anew. "
                            f"The newest: {reasons[0]}")
        return None


@contextmanager
def prepared(run: RunFolder, config: Config, *, resume: bool, overwrite: bool,
             judge: Callable | None = None) -> Iterator[RunFolder]:
    """Hold the lock of the run's folder and make it ready for ``config``. Collective: rank 0 does it.

    Raises:
        UserError: Another job holds it, or see ``RunFolder.prepare``.
    """
    with ExitStack() as held:
        distributed.barrier()                        # others may still read weights in a folder that is moved aside
        distributed.on_rank_zero(lambda: held.enter_context(lock_folder(run.path)))
        distributed.on_rank_zero(lambda: run.prepare(config, resume=resume, overwrite=overwrite, judge=judge))
        yield run


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


# What a run of another program keeps when it becomes one of this program.
DECIDE_ADOPTION = {**DECIDE_IMAGES, "optim": ("optimizer", "amsgrad")}
# What may change when a run is resumed, but changes what it computes: a warning names it.
MAY_CHANGE = {"data": ("random_flip", "validation_fraction", "labels", "max_size"), "model": ("dropout",),
              "training": None, "optim": None}
OWN = "; to use the run's own configuration leave out --config and such keys"


def differences(stored: Config, given: Config, sections: dict) -> list[str]:
    """The keys of ``sections`` with other values, in words; of ``model`` all or those named."""
    found = []
    for section, keys in sections.items():
        old, new = (_plain(getattr(config, section), keys) for config in (stored, given))
        found += [f"{section}.{key} is {_told(old.get(key))} there, {_told(new.get(key))} here"
                  for key in {**old, **new} if old.get(key) != new.get(key)]
    return found


def _plain(section, keys: tuple | None) -> dict:
    """Keys and values; of ``model``, unless they are named, those that decide what the weights compute."""
    if keys is None:
        return section.essence() if isinstance(section, Network) else dict(section)
    return {key: value for key, value in section if key in keys}


def _told(value) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else repr(value)


def refuse_differences(stored: Config, given: Config, where: Path, sections: dict = DECIDE_IMAGES,
                       advice: str = OWN) -> None:
    """UserError that lists the keys in which two configurations contradict each other."""
    found = differences(stored, given, sections)
    if found:
        raise UserError(f"{where} contradicts the given configuration: {'; '.join(found)}{advice}")


def _epoch(path: Path) -> float:
    """The number in a checkpoint's name; infinite for ckpt.pth."""
    number = re.search(r"\d+", path.name)
    return int(number[0]) if number else float("inf")


def _by_epoch(folder: Path, pattern: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if re.fullmatch(pattern, p.name)), key=_epoch, reverse=True)
