"""The work of a study: runs that differ in their remedies only, trained alike and measured in a grid of cells."""

import logging
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from configs.sampling import SamplerSettings
from configs.study import study_yaml
from models.inception import load_inception
from runners import distributed
from runners.diagnosis.measures import Diagnosis
from runners.diagnosis.trajectories import Trajectories
from runners.diffusion import Diffusion
from runners.evaluation.metrics import Evaluation, append_log, make_reference
from runners.sampling.folder import gamma_fingerprint
from runners.sampling.gamma import write_gamma
from runners.sampling.generation import generate_and_measure, write_grid
from runners.sampling.sampler import Sampler
from runners.signals import Signals
from runners.study.grid import Cell, prepare_cells
from runners.study.job import StudyJob, seeds_text
from runners.training.checkpoint import RunFolder
from runners.training.plan import Plan
from utils.atomic import write_text
from utils.errors import Interrupted, UserError
from utils.locks import exclusive

log = logging.getLogger(__name__)
TIMES = "timesteps", "skip_type", "sigma_min", "sigma_max", "rho"              # what decides a chain's times


class StudyRunner:
    """Trains and measures; what is done is not done again.

    Args:
        job: The request. ``work`` wants the folders of its runs to be locked by the caller.
        device: Where to compute.
        inception_weights: See ``load_inception``.
    """

    def __init__(self, job: StudyJob, device, inception_weights=None):
        self.job, self.device, self.inception_weights = job, device, inception_weights
        self.net = self.reference = self.signals = None

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
        if todo:                                                   # first: what does not fit must not cost a training
            self.net = load_inception(self.inception_weights, self.device)
            self._open_reference(done)
        with Signals().listening() as self.signals:
            for run, seed in job.runs:
                self.train(f"{run}-{seed}")
        if todo:
            if self.reference is None:
                self._make_reference(done)
            with Signals().listening() as self.signals:
                self._measure_all(todo)

    def _make_reference(self, done: dict[str, dict]) -> None:
        """Or wait for another process that is making it. A signal ends the process meanwhile."""
        job, study, target = self.job, self.job.study, self.job.folder / "reference.npz"
        with ExitStack() as held:
            distributed.on_rank_zero(lambda: held.enter_context(
                exclusive(job.folder / ".reference.lock", f"making {target}")))
            self._open_reference(done)
            if self.reference is None:
                log.info("making %s", target)
                make_reference(job.any_config, self.net, target, root=job.datasets, num=study.reference_images,
                               keep_features=True, spatial="sfid" in study.metrics)
                self._open_reference(done)

    def _open_reference(self, done: dict[str, dict]) -> None:
        self.reference = distributed.on_rank_zero(lambda: self._checked_reference(done))

    def _checked_reference(self, done: dict[str, dict]):
        """None if there is none yet. UserError: It does not fit the metrics, or cells were measured with another."""
        reference = self.job.reference()
        if reference is not None:
            Evaluation(reference, self.net, self.job.study.metrics)
            if {entry["reference_fingerprint"] for entry in done.values()} - {reference.fingerprint}:
                raise UserError(f"cells in {self.job.folder} were measured against another reference than "
                                f"{reference.name}; choose another --name")
        return reference

    def _prepare_folder(self) -> None:
        write_text(self.job.folder / "study.yml", study_yaml(self.job.study))
        for run, seed in self.job.runs:
            prepare_cells(self.job.folder / "cells" / f"{run}-{seed}.jsonl")

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

    def _measure_all(self, cells: list[Cell]) -> None:
        started, diffusion, loaded = time.monotonic(), None, None
        for number, cell in enumerate(cells):
            path = distributed.on_rank_zero(lambda cell=cell: self._trained_weights(cell))
            if path != loaded:
                diffusion, loaded = Diffusion(self.job.configs[cell.doc], self.device), path
                diffusion.load(path)
            self._stop_if_told()
            entry = self.measure(cell, diffusion, path)
            left = (time.monotonic() - started) / (number + 1) * (len(cells) - number - 1)
            headline = self.job.study.metrics[0]
            log.info("%s: %s %.4g; %.0f s; %d cells and about %.0f min left", cell, headline, entry[headline],
                     entry["seconds"], len(cells) - number - 1, left / 60)

    def _trained_weights(self, cell: Cell) -> Path:
        path = self.job.weights(cell.doc, cell.images_seen)
        if path is None:
            raise UserError(f"{self.job.run(cell.doc).path}: the weights after {cell.images_seen} images are gone; the "
                            "same command trains them anew")
        return path

    def measure(self, cell: Cell, diffusion: Diffusion, path: Path) -> dict:
        """Sample, compare with the reference, append the line of ``cell``; returns its numbers."""
        study, started = self.job.study, time.perf_counter()
        sampler, fit = self._resolve(cell, diffusion)
        evaluation = Evaluation(self.reference, self.net, study.metrics, interval=study.interval)
        seeds, batch_size = self.job.image_seeds(cell.seed), diffusion.config.sampling.batch_size
        made = generate_and_measure(sampler, seeds, batch_size, evaluation=evaluation, keep=study.grid,
                                    between=self._stop_if_told)
        write_grid(made.shown, self.job.folder / "grids" / f"{cell.file_name}.png", sampler, seeds)
        weights = diffusion.weights
        details = {
            "study": asdict(cell), "weights": str(path), "weights_fingerprint": weights.fingerprint,
            "weights_kind": weights.kind, "step": self.job.step(cell.images_seen),
            "sampler": {**sampler.settings.model_dump(mode="json"), **gamma_fingerprint(sampler.settings)}, "fit": fit,
            "network_calls": self.job.calls[cell.key],
            "seeds": seeds_text(seeds), "batch_size": batch_size, "amp": "off",
            "device": str(diffusion.device), "sampling_seconds": round(made.seconds, 2),
            "seconds": round(time.perf_counter() - started, 2)}
        distributed.on_rank_zero(
            lambda: append_log(self.job.folder / "cells" / f"{cell.doc}.txt", path, made.results, details))
        return {**details, **made.results}

    def _resolve(self, cell: Cell, diffusion: Diffusion) -> tuple[Sampler, dict | None]:
        """The sampler, with a number for ``eps_scaler: fit`` and a file for ``gamma: measure``, and that fit with
        whether diagnose.py would advise against it."""
        if not (cell.fits or cell.measures_gamma):
            return diffusion.sampler(cell.sampler()), None
        images = diffusion.open_images(self.job.datasets)

        def diagnosis(settings):
            return Diagnosis(diffusion, images, settings, num_images=self.job.study.fit_images,
                             batch_size=diffusion.config.sampling.batch_size)

        gamma = fit = None
        if cell.measures_gamma:
            path = self.job.folder / "gamma" / f"{cell.file_name}.json"
            plain = SamplerSettings(**{key: cell.settings[key] for key in TIMES if key in cell.settings})
            rows = Trajectories(diagnosis(plain)).gammas()
            distributed.on_rank_zero(lambda: write_gamma(path, rows, diffusion, {"run": cell.doc}))
            gamma = str(path)
        if cell.fits:
            chain = diagnosis(cell.sampler(gamma=gamma))
            found, _ = chain.fit("constant")
            fit = {**found._asdict(), "no_correction": chain.is_no_correction(found)}
        return diffusion.sampler(cell.sampler(fit and fit["b"], gamma)), fit

    def _stop_if_told(self) -> None:
        event = max(distributed.gather_objects(self.signals.signum))
        if event:
            raise Interrupted(event, f"stopped by signal {event}: the cells measured so far are in "
                                     f"{self.job.folder / 'cells'}; the same command goes on")
