"""The checked request of a study: its runs with their configurations, its cells, and where they lie.

    EXP/studies/NAME/    study.yml  cells/RUN.jsonl  grids/*.png  reference.npz  report.md  report.html
    EXP/logs/NAME/RUN/   the runs, as train_ddp.py writes them
"""

import json
from pathlib import Path

from configs.reading import find_config, parse_yaml
from configs.schema import Config, Data, Training, load_config
from configs.study import Study, load_study
from datasets import find_dataset
from functions.prediction import make_prediction
from functions.schedule import make_schedule
from models import make_codec
from runners.evaluation.metrics import find_reference
from runners.evaluation.references import source_words
from runners.sampling.sampler import check_settings
from runners.sampling.steps import calls_of
from runners.study.grid import cells_of, read_cells
from runners.training.checkpoint import RunFolder, differences
from utils.errors import ConfigError, UserError
from utils.names import safe_name

# What the study itself decides about its runs: snapshots at ``images_seen`` and no others, no pictures meanwhile.
OWN_KEYS = {"training.snapshot_unit": "steps", "training.snapshot_freq": 10**9, "training.sample_num": 0,
            "training.fid_freq": 0, "training.keep_last": None, "training.keep_every": None}
# Cells with different values of these do not belong into one table.
KEPT = ("num_images", "image_seeds", "metrics", "interval", "fid_stats", "reference_images", "fit_images", "grid")
DECIDE_A_RUN = {**dict.fromkeys(("model", "diffusion", "loss", "optim")),
                "training": tuple(set(Training.model_fields) - {"log_freq", "checkpoint_minutes", "compile",
                                                                "activation_checkpointing"}),
                "data": tuple(set(Data.model_fields) - {"root", "num_workers", "cache"})}


class StudyJob:
    """The checked request: runs, their configurations, cells.

    Args:
        study: File, or a name in configs/studies/.
        exp: Folder of runs and studies.
        name: Of the study's folders; default: the file's.
        overrides: ``"section.key=value"`` for all runs.
        only: Names of the runs to work on; none: all.
    """

    def __init__(self, study: str | Path, exp: str | Path = "exp", name: str | None = None, overrides=(), only=None):
        self.study = with_overrides(load_study(study), overrides)
        self.name, exp = safe_name("--name", name or Path(study).stem), Path(exp)
        self.folder, self.logs, self.datasets = exp / "studies" / self.name, exp / "logs" / self.name, exp / "datasets"
        unknown = set(only or ()) - set(self.study.runs)
        if unknown:
            raise UserError(f"--only {' '.join(sorted(unknown))}: no such run; runs: {', '.join(self.study.runs)}")
        self.runs = [(run, seed) for seed in self.study.seeds for run in self.study.runs if not only or run in only]
        config = find_config(self.study.config).resolve()                # found, and told about, once
        self.configs = {f"{run}-{seed}": run_config(self.study, config, run, seed) for run in self.study.runs
                        for seed in self.study.seeds}
        docs = {f"{run}-{seed}" for run, seed in self.runs}
        self.all_cells = cells_of(self.study)
        self.cells = [cell for cell in self.all_cells if cell.doc in docs]
        self._check()

    def run(self, doc: str) -> RunFolder:
        return RunFolder(self.logs / doc, self.datasets)

    def step(self, images_seen: int) -> int:
        """Optimizer steps after so many images."""
        return images_seen // self.any_config.training.global_batch_size

    @property
    def any_config(self) -> Config:
        return next(iter(self.configs.values()))

    def image_seeds(self, training_seed: int) -> range:
        """Of the images of a cell; below 2^32, as all seeds are."""
        count = self.study.num_images
        first = 0 if self.study.image_seeds == "shared" else training_seed * count % (2**32 - count)
        return range(first, first + count)

    def read_cells(self) -> dict[str, dict]:
        return read_cells(self.folder / "cells")

    def trained(self, doc: str) -> bool:
        """Whether all weights to be measured are there."""
        return all(self.weights(doc, images) is not None for images in self.study.images_seen)

    def weights(self, doc: str, images_seen: int) -> Path | None:
        step = self.step(images_seen)
        files = [self.run(doc).path / name for name in (f"model_{step}_ema.pth", f"ckpt_{step}.pth")]
        return next((file for file in files if file.exists()), None)

    def reference(self):
        """The checked reference, or None: it is still to be made."""
        own = self.folder / "reference.npz"
        if self.study.fid_stats is None and not own.exists():
            return None
        words = source_words(self.study.config, self.datasets.parent, as_overrides(self.study.overrides))
        return find_reference(self.any_config, self.study.fid_stats or own, source=words)

    def _check(self) -> None:
        batch = self.any_config.training.global_batch_size
        for doc, config in self.configs.items():
            if config.data != self.any_config.data or config.training.global_batch_size != batch:
                raise UserError(f"run {doc}: the runs of a study have the same data section and global_batch_size")
        for images in self.study.images_seen:
            if images % batch:
                raise UserError(f"images_seen {images} is not a multiple of the global batch of {batch} images")
        self.calls = {}                                              # network calls for each image, by Cell.key
        for cell in self.all_cells:
            settings, config = cell.sampler(), self.configs[cell.doc]
            times = check_settings(settings, config, make_codec(config))
            schedule = make_schedule(config.diffusion)
            self.calls[cell.key] = calls_of(settings, schedule, make_prediction(config.diffusion), times)
        find_dataset(self.any_config, self.datasets)
        self._refuse_mixing()
        self.reference()

    def _refuse_mixing(self) -> None:
        """Cells may be added to a study; what is measured already must not change its meaning."""
        changed, file = [], self.folder / "study.yml"
        if file.exists():
            stored = load_study(file)
            changed = [f"{key} was {getattr(stored, key)!r}, is {getattr(self.study, key)!r}" for key in KEPT
                       if getattr(stored, key) != getattr(self.study, key)]
            changed += [f"run {run} was {old}, is {self.study.runs[run]}" for run, old in stored.runs.items()
                        if self.study.runs.get(run, old) != old]
        for entry in list(self.read_cells().values())[:1]:           # an older file does not say what they were
            given, seeds = entry.get("seeds"), seeds_text(self.image_seeds(entry["study"]["seed"]))
            if not changed and given not in (None, seeds):
                changed.append(f"the images of its cells have the seeds {given}, not {seeds}; image_seeds: shared goes "
                               "on from 0")
        for doc, config in self.configs.items():
            if self.run(doc).config.exists():
                changed += [f"run {doc}: {line}" for line in
                            differences(load_config(self.run(doc).config), config, DECIDE_A_RUN)]
        if changed:
            raise UserError(f"{self.folder} holds another study ({'; '.join(changed)}); choose another --name")


def seeds_text(seeds: range) -> str:
    return f"{seeds[0]}-{seeds[-1]}"


def with_overrides(study: Study, overrides) -> Study:
    """``"section.key=value"`` for all runs, beside what the file says."""
    given = dict(override.split("=", 1) for override in overrides)
    parsed = {key: parse_yaml(text, f"--{key} {text}") for key, text in given.items()}
    study = study.model_copy(update={"overrides": {**study.overrides, **parsed}})
    for keys in (study.overrides, *study.runs.values()):
        taken = sorted(keys.keys() & {*OWN_KEYS, "training.seed"})
        if taken:
            raise UserError(f"{taken[0]} is set by the study itself; its seeds and images_seen say what is kept")
    return study


def as_overrides(keys: dict) -> list[str]:
    """``"section.key=value"`` of each, as ``load_config`` reads them."""
    return [f"{key}={json.dumps(value, default=str)}" for key, value in keys.items()]


def run_config(study: Study, path: Path, run: str, seed: int) -> Config:
    """Of the file at ``path``. Its batch is global, so that a study is the same on any number of processes."""
    overrides = as_overrides({**study.overrides, **study.runs[run], **OWN_KEYS, "training.seed": seed})
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        raise ConfigError(f"run {run} of the study: {error}") from None
    if config.training.global_batch_size is None:
        overrides.append(f"training.global_batch_size={config.training.batch_size}")
    return load_config(path, overrides)
