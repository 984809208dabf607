"""A study: runs that differ in their remedies only, trained alike and measured in a grid of cells.

    EXP/studies/NAME/    study.yml  cells/RUN.jsonl  grids/*.png  reference.npz  report.md  report.html
    EXP/logs/NAME/RUN/   the runs, as train_ddp.py writes them
"""

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path

from configs.reading import find_config, parse_yaml
from configs.sampling import SamplerSettings
from configs.schema import Config, Data, Training, load_config
from configs.study import Study, load_study, study_yaml
from datasets import find_dataset
from functions.prediction import make_prediction
from functions.schedule import make_schedule
from models import make_codec
from models.inception import load_inception
from runners import distributed
from runners.diagnosis.measures import Diagnosis
from runners.diagnosis.trajectories import Trajectories
from runners.diffusion import Diffusion
from runners.evaluation.metrics import Evaluation, append_log, find_reference, make_reference
from runners.evaluation.references import source_words
from runners.network import explain_out_of_memory
from runners.sampling.folder import gamma_fingerprint
from runners.sampling.gamma import write_gamma
from runners.sampling.generation import generate_and_measure, write_grid
from runners.sampling.sampler import Sampler, calls_of, check_settings
from runners.study.grid import Cell, cells_of, drop_broken_lines, read_cells
from runners.training.checkpoint import RunFolder, differences
from runners.training.plan import Plan
from utils.atomic import write_text
from utils.errors import ConfigError, Interrupted, UserError
from utils.names import safe_name

log = logging.getLogger(__name__)

# What the study itself decides about its runs: snapshots at ``images_seen`` and no others, no pictures meanwhile.
OWN_KEYS = {"training.snapshot_unit": "steps", "training.snapshot_freq": 10**9, "training.sample_num": 0,
            "training.fid_freq": 0, "training.keep_last": None}
# Cells with different values of these do not belong into one table.
KEPT = ("num_images", "metrics", "interval", "fid_stats", "reference_images", "fit_images", "grid")
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
        """The checked reference, or None: it is to be made first."""
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
        for doc, config in self.configs.items():
            if self.run(doc).config.exists():
                changed += [f"run {doc}: {line}" for line in
                            differences(load_config(self.run(doc).config), config, DECIDE_A_RUN)]
        if changed:
            raise UserError(f"{self.folder} holds another study ({'; '.join(changed)}); choose another --name")


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


class StudyRunner:
    """Trains and measures; what is done is not done again.

    Args:
        job: The request. ``work`` wants the folders of its runs to be locked by the caller.
        device: Where to compute.
        net: Feature network; default: Inception.
        inception_weights: See ``load_inception``.
    """

    def __init__(self, job: StudyJob, device, net=None, inception_weights=None):
        self.job, self.device, self.net, self.inception_weights = job, device, net, inception_weights
        self.reference = self.signals = None

    def work(self) -> None:
        """Train what is not trained, then measure what is not measured.

        Raises:
            Interrupted: A signal came; the same command goes on.
        """
        job = self.job
        distributed.on_rank_zero(self._prepare_folder)
        done = distributed.on_rank_zero(job.read_cells)
        todo = [cell for cell in job.cells if cell.key not in done]
        log.info("%d of %d cells are measured already", len(job.cells) - len(todo), len(job.cells))
        if todo:
            self._open_metrics()                                   # first: a wrong reference must not cost a training
            distributed.on_rank_zero(lambda: self._refuse_other_reference(done))
        with explain_out_of_memory(), distributed.Signals().listening() as self.signals:
            for run, seed in job.runs:
                self.train(f"{run}-{seed}")
            self._measure_all(todo)

    def _refuse_other_reference(self, done: dict[str, dict]) -> None:
        used = {entry["reference_fingerprint"] for entry in done.values()} - {self.reference.fingerprint}
        if used:
            raise UserError(f"cells in {self.job.folder} were measured against another reference than "
                            f"{self.reference.name}; choose another --name")

    def _prepare_folder(self) -> None:
        write_text(self.job.folder / "study.yml", study_yaml(self.job.study))
        for run, seed in self.job.runs:
            drop_broken_lines(self.job.folder / "cells" / f"{run}-{seed}.jsonl")

    # ------------------------------------------------------------------------------------------------------- training

    def train(self, doc: str) -> None:
        """Train run ``doc`` to the budget, keeping weights after each of ``images_seen``."""
        job, config = self.job, self.job.configs[doc]
        if distributed.on_rank_zero(lambda: job.trained(doc)):
            log.info("%s is trained", doc)
            return
        run, diffusion = job.run(doc), Diffusion(config, self.device)
        images = diffusion.open_training_images(run)
        distributed.on_rank_zero(lambda: self._check_budget(doc, images.num_images))
        distributed.on_rank_zero(lambda: run.prepare(config, resume=True, overwrite=False))
        for seen in job.study.images_seen:
            self._stop_if_told()
            if distributed.on_rank_zero(lambda seen=seen: job.weights(doc, seen)) is None:
                log.info("%s: training to %d images", doc, seen)
                self._train_to(diffusion, run, doc, seen)

    def _check_budget(self, doc: str, num_images: int) -> None:
        job, study = self.job, self.job.study
        budget = Plan.make(job.configs[doc].training, num_images, distributed.world_size()).total_steps
        if budget < job.step(study.images_seen[-1]):
            raise UserError(f"images_seen {study.images_seen[-1]} needs {job.step(study.images_seen[-1])} steps, {doc} "
                            f"ends after {budget}: give more training.n_epochs, under another --name")
        if study.fit_images > num_images:
            raise UserError(f"fit_images {study.fit_images} are more than the {num_images} training images")

    def _train_to(self, diffusion: Diffusion, run: RunFolder, doc: str, seen: int) -> None:
        def refuse_missing() -> None:
            if self.job.weights(doc, seen) is None:
                raise UserError(f"{run.path} is trained beyond {seen} images and has no weights of then: images_seen "
                                "can be added at the end only; choose another --name")

        try:
            diffusion.train(run, resume=True, max_steps=self.job.step(seen), signals=self.signals)
        except Interrupted as stop:
            raise Interrupted(stop.code - 128, f"{doc}: training is saved; the same command goes on") from None
        distributed.on_rank_zero(refuse_missing)

    # ------------------------------------------------------------------------------------------------------ measuring

    def _open_metrics(self) -> None:
        """Feature network and reference, which is made when the study names none; signals end the process meanwhile."""
        job, study = self.job, self.job.study
        self.net = self.net or load_inception(self.inception_weights, self.device)
        if distributed.on_rank_zero(lambda: job.reference() is None):
            log.info("making %s", job.folder / "reference.npz")
            make_reference(job.any_config, self.net, job.folder / "reference.npz", root=job.datasets,
                           num=study.reference_images, keep_features=True, spatial="sfid" in study.metrics)
        self.reference = job.reference()
        Evaluation(self.reference, self.net, study.metrics)        # refuses what does not fit

    def _measure_all(self, cells: list[Cell]) -> None:
        started, diffusion, loaded = time.monotonic(), None, None
        for number, cell in enumerate(cells):
            path = distributed.on_rank_zero(lambda cell=cell: self.job.weights(cell.doc, cell.images_seen))
            if path != loaded:
                diffusion, loaded = Diffusion(self.job.configs[cell.doc], self.device), path
                diffusion.load(path)
            self._stop_if_told()
            entry = self.measure(cell, diffusion, path)
            left = (time.monotonic() - started) / (number + 1) * (len(cells) - number - 1)
            headline = self.job.study.metrics[0]
            log.info("%s: %s %.4g; %.0f s; %d cells and about %.0f min left", cell, headline, entry[headline],
                     entry["seconds"], len(cells) - number - 1, left / 60)

    def measure(self, cell: Cell, diffusion: Diffusion, path: Path) -> dict:
        """Sample, compare with the reference, append the line of ``cell``; returns its numbers."""
        study, started = self.job.study, time.perf_counter()
        sampler, fit = self._resolve(cell, diffusion)
        evaluation = Evaluation(self.reference, self.net, study.metrics, interval=study.interval)
        seeds, batch_size = range(study.num_images), diffusion.config.sampling.batch_size
        made = generate_and_measure(sampler, seeds, batch_size, evaluation=evaluation, keep=study.grid,
                                    between=self._stop_if_told)
        write_grid(made.shown, self.job.folder / "grids" / f"{cell.file_name}.png", sampler, seeds)
        weights = diffusion.weights
        details = {
            "study": asdict(cell), "weights": str(path), "weights_fingerprint": weights.fingerprint,
            "weights_kind": weights.kind, "step": self.job.step(cell.images_seen),
            "sampler": {**sampler.settings.model_dump(mode="json"), **gamma_fingerprint(sampler.settings)}, "fit": fit,
            "network_calls": self.job.calls[cell.key],
            "seeds": f"0-{study.num_images - 1}", "batch_size": batch_size, "amp": "off",
            "device": str(diffusion.device), "sampling_seconds": round(made.seconds, 2),
            "seconds": round(time.perf_counter() - started, 2)}
        distributed.on_rank_zero(
            lambda: append_log(self.job.folder / "cells" / f"{cell.doc}.txt", path, made.results, details))
        return {**details, **made.results}

    def _resolve(self, cell: Cell, diffusion: Diffusion) -> tuple[Sampler, dict | None]:
        """The sampler, with a number for ``eps_scaler: fit`` and a file for ``gamma: measure``, and that fit."""
        if not (cell.fits or cell.measures_gamma):
            return diffusion.sampler(cell.sampler()), None
        images = diffusion.open_images(self.job.datasets)

        def diagnosis(settings):
            return Diagnosis(diffusion, images, settings, num_images=self.job.study.fit_images,
                             batch_size=diffusion.config.sampling.batch_size)

        gamma = fit = None
        if cell.measures_gamma:
            path = self.job.folder / "gamma" / f"{cell.file_name}.json"
            plain = SamplerSettings(timesteps=cell.settings["timesteps"], skip_type=cell.settings.get("skip_type"))
            rows = Trajectories(diagnosis(plain)).gammas()
            distributed.on_rank_zero(lambda: write_gamma(path, rows, diffusion, {"run": cell.doc}))
            gamma = str(path)
        if cell.fits:
            fit, _ = diagnosis(cell.sampler(gamma=gamma)).fit("constant")
        return diffusion.sampler(cell.sampler(fit and fit.b, gamma)), fit and fit._asdict()

    def _stop_if_told(self) -> None:
        event = max(distributed.gather_objects(self.signals.signum))
        if event:
            raise Interrupted(event, f"stopped by signal {event}: the cells measured so far are in "
                                     f"{self.job.folder / 'cells'}; the same command goes on")
