"""What one call of ``Diffusion.train`` holds, and what it does between optimizer steps."""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext
from itertools import tee

import torch
from torch import Tensor

from datasets.latents import choose_variant
from functions.losses import sequence_aware_loss
from functions.timesteps import TimeSampler
from runners import distributed
from runners.network import AMP, Network, amp_name, explain_amp, resolve_amp, resolve_compile
from runners.signals import Abandoned
from runners.training.adopting import FORMAT_VERSION
from runners.training.checkpoint import RunFolder
from runners.training.grids import training_sheet
from runners.training.monitor import Monitor
from runners.training.periodic_fid import PeriodicFid
from runners.training.plan import Plan
from runners.training.resuming import Judge, identity
from runners.training.state import TrainingState
from runners.training.writer import CheckpointWriter, refuse_non_finite
from utils.errors import DivergedError, UserError

log = logging.getLogger(__name__)


class Session:
    """The state of a training run and its reports.

    Args:
        diffusion: Whose network is trained.
        run: Where everything goes.
        plan: Batches, shards and steps.
        images: ImageStore of the training images.
        signals: Whose vote saves and stops.
        judge: Continue from the newest checkpoint, if there is one that passes it; None: start anew.

    Attributes:
        network: What a training step differentiates.
        state: What a training step changes.
        step: Optimizer steps done, over all calls.
        event: Outcome of the last vote: 0, Signals.SAVE, or the signal that ends the run.
    """

    def __init__(self, diffusion, run: RunFolder, plan: Plan, images, signals, judge: Judge | None):
        training = diffusion.config.training
        self.diffusion, self.run, self.plan, self.images, self.signals = diffusion, run, plan, images, signals
        self.training, self.held = training, ExitStack()
        amp = distributed.on_rank_zero(lambda: resolve_amp(training.amp, diffusion.device))    # CPUs may differ
        stored = self._find_stored(judge) if judge else {}
        if stored:
            amp = self._keep_precision(amp, stored)
        self.state = TrainingState(diffusion.model, diffusion.config, plan.total_steps, plan.global_batch,
                                   loss_scaling=amp is torch.float16)
        self.network = self._make_network(amp)
        if begin := stored or diffusion.inherited:
            self.state.load_state_dict(begin)
        diffusion.averages = self.state.averages
        diffusion.inherited = None                   # it is as large as the state itself
        self.data = judge.data if judge else identity(diffusion.model, images)
        self.step, self.best = stored.get("step", 0), stored.get("best_fid")
        self.event, self.line, self.saved_at, self.began = 0, {}, time.monotonic(), time.monotonic()
        self.first_grid_due = self.step == 0 and training.first_grid_minutes > 0
        self._snapshots, self._sums = stored.get("snapshots") or [], stored.get("metric_sums")

    def open(self) -> None:
        """Open what a step reports to; nothing of an earlier run is touched before."""
        training, diffusion = self.training, self.diffusion
        self.writer = self.held.enter_context(
            CheckpointWriter(self.run, training.keep_last, training.keep_every, self._snapshots))
        self.monitor = Monitor(self.run, self.plan, diffusion.device, self.step, self._sums,
                               diffusion.config.loss.variational != "none", training.loggers,
                               diffusion.config.model_dump(mode="json"))
        self.held.callback(self.monitor.close)
        self.held_out = self._open_held_out()
        self.fid = PeriodicFid(diffusion.config, diffusion.device) if training.fid_freq else None
        self.batches = self.held.enter_context(closing(self._batches()))     # with it, the workers that decode end

    def __enter__(self):
        return self

    @property
    def finished(self) -> bool:
        """Whether an earlier call has done all steps of this one."""
        return self.step >= self.plan.last_step

    def __exit__(self, *exception) -> None:
        self.held.close()

    @property
    def goes_on(self) -> bool:
        return not self.finished and self.event <= self.signals.SAVE

    # ---------------------------------------------------------------------------------------------------- beginning

    def _make_network(self, amp: torch.dtype | None) -> Network:
        diffusion, training, plan = self.diffusion, self.training, self.plan
        compiled = distributed.on_rank_zero(lambda: resolve_compile(training.compile, diffusion.device,
                                                                    plan.last_step * plan.accumulate))
        usual = amp is resolve_amp(training.amp, diffusion.device)
        precision = explain_amp(training.amp, diffusion.device) if usual else f"auto: {amp_name(amp)}, as the run began"
        log.info("%d images, %d steps in an epoch, %d in this run; batch %d = %d processes x %d calls x %d images; "
                 "%s, amp %s, compile %s", plan.num_images, plan.steps_per_epoch, plan.last_step, plan.global_batch,
                 plan.world_size, plan.accumulate, plan.micro_batch, diffusion.device,
                 precision, "on" if compiled else "off")
        return Network(diffusion.model, diffusion.device, amp, compiled=compiled, ddp=plan.world_size > 1,
                       accumulate=plan.accumulate)

    def _find_stored(self, judge: Judge) -> dict:
        """The newest full state that is whole; an empty dictionary where there is none.

        Raises:
            UserError: The ranks do not see the same run folder.
        """
        found = self.run.load_newest(judge)
        if len(set(distributed.gather_objects(found and found[0]["step"]))) > 1:
            raise UserError(f"the ranks find different checkpoints in {self.run.path}; it must lie on a shared file "
                            "system")
        if found is None:
            return {}
        stored, path = found
        log.info("resumed from %s: step %d, epoch %d", path, stored["step"], stored["epoch"])
        if stored.get("global_batch") not in (None, self.plan.global_batch):
            log.warning("resuming with another global batch: %d images there, %d here; training.global_batch_size "
                        "keeps it for any number of processes", stored["global_batch"], self.plan.global_batch)
        return stored

    def _keep_precision(self, amp: torch.dtype | None, stored: dict) -> torch.dtype | None:
        """``amp: auto`` goes on with what the run began with, also where this device would have chosen otherwise."""
        device = self.diffusion.device
        began = stored.get("amp", "off" if device.type == "cpu" else None)    # an older file's auto
        if self.training.amp != "auto" or began not in AMP or began == amp_name(amp):
            return amp
        if began == "fp16" and device.type == "cpu":
            log.warning("amp auto: the run began with fp16, which a CPU has not; it goes on with %s", amp_name(amp))
            return amp
        return AMP[began]

    def _open_held_out(self):
        """ImageStore of the held-out images on rank 0, or None."""
        if not self.training.validation_freq:
            return None
        opened = []
        distributed.on_rank_zero(lambda: opened.append(self.diffusion.open_images(self.run.datasets, "test")))
        return opened[0] if opened else None

    def _batches(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """(images, condition) of this rank's network calls, b images each, as ``Objective.draw`` takes them."""
        fed, again = tee(self.plan.index_lists(self.step))
        condition = self.diffusion.conditions_of(self.images)
        for images, indices in zip(self.images.batches(fed), again, strict=False):
            yield images, condition(indices)

    # ------------------------------------------------------------------------------------------- after each step

    def report(self) -> None:
        """A line of metrics where one is due; stop a run that diverges."""
        training, step = self.training, self.step
        last = step == self.plan.last_step
        if step % training.log_freq == 0 or last:
            self.line = self.monitor.publish(step, self.state.last_lr)
        if step % min(training.log_freq, training.max_bad_steps) == 0 or last:
            self.state.check_divergence(step)

    @torch.no_grad()
    def validate(self) -> None:
        """Plain loss of the averaged weights on held-out images, with the same noise at every call. Rank 0 alone."""
        if self.training.validation_freq and not self.step % self.training.validation_freq:
            with self.monitor.paused():
                distributed.on_rank_zero(
                    lambda: self.monitor.scalar("validation_loss", self._held_out_loss(), self.step))

    def _held_out_loss(self) -> float:
        diffusion, config = self.diffusion, self.diffusion.config
        denoiser, generator = diffusion.denoiser(), torch.Generator(diffusion.device).manual_seed(0)
        images, condition_of = self.held_out, diffusion.conditions_of(self.held_out)
        times = TimeSampler(self.diffusion.schedule) if self.state.times.learns else self.state.times
        num, total = min(self.training.validation_num, images.num_images), 0.0
        chunks = torch.arange(num).split(config.sampling.batch_size)
        for batch, chosen in zip(images.batches(chunks), chunks, strict=True):
            condition = condition_of(chosen)
            if batch.is_floating_point():
                batch, condition = choose_variant(batch, condition)
            x0 = diffusion.codec.encode(batch, generator)
            t, _ = times.draw(len(x0), generator)
            noise = torch.randn((1, *x0.shape), generator=generator, device=x0.device)
            given = denoiser.given(condition)
            total += float(sequence_aware_loss(given, x0, t, noise, lamda=0.0, reduce=config.loss.reduce).total.sum())
        return total / num

    def measure(self) -> None:
        """FID of the averaged weights where it is due; the snapshot of the best one is kept. Collective."""
        if not self.plan.fid_due(self.step, self.training):
            return
        alone = distributed.world_size() == 1                # other ranks would wait for one that leaves
        try:
            with self.monitor.paused(), self.signals.abandonable() if alone else nullcontext():
                results = self.fid.measure(self.diffusion)
        except Abandoned:
            log.warning("no FID at step %d: a signal came; generate.py computes that of a snapshot", self.step)
            return
        except DivergedError as error:                       # on all ranks; training may be well
            log.warning("no FID at step %d: %s", self.step, error)
            return
        if self.best is None or results["fid"] < self.best["fid"]:
            self.best = {"fid": results["fid"], "snapshot": self.snapshot, "step": self.step}
        if distributed.rank() == 0:
            self.monitor.scalar("fid", results["fid"], self.step, told=True)
            log.info("%s %.4f; the best so far: %.4f at step %d", results["name"], results["fid"], self.best["fid"],
                     self.best["step"])

    @property
    def snapshot(self) -> int | None:
        """Id of the snapshot to be taken after this step, or None."""
        return self.plan.snapshot(self.step, self.training)

    def save(self) -> None:
        """Vote, and write what is due: a snapshot with its grid, or ckpt.pth alone."""
        snapshot, last = self.snapshot, self.step == self.plan.last_step
        minutes = self.training.checkpoint_minutes
        due = distributed.rank() == 0 and 0 < minutes * 60 < time.monotonic() - self.saved_at    # one clock for all
        self.event = self.signals.vote(due)
        if due or snapshot is not None:
            self.saved_at = time.monotonic()
        if self.event or snapshot is not None or last:
            sums = self.monitor.state()                      # of all ranks; the rest of the state is the same on each
            distributed.on_rank_zero(lambda: self.writer.save(self.full_state(sums), snapshot))
        if self.event <= self.signals.SAVE:
            if snapshot is not None or last:
                distributed.on_rank_zero(self.draw_grid)
            elif distributed.rank() == 0 and self._first_grid_now():
                self.draw_grid()

    def _first_grid_now(self) -> bool:
        """Once, when the first minutes of a run are over and nothing has been drawn yet."""
        return self.first_grid_due and time.monotonic() - self.began > 60 * self.training.first_grid_minutes

    def full_state(self, metric_sums: list) -> dict:
        """All that resuming needs.

        Raises:
            DivergedError: A weight or a moment is not finite.
        """
        full = {"format_version": FORMAT_VERSION, "config": self.diffusion.config.model_dump(mode="json"),
                "step": self.step, "epoch": self.step // self.plan.steps_per_epoch, "best_fid": self.best,
                "global_batch": self.plan.global_batch,
                "amp": amp_name(self.network.amp), "metric_sums": metric_sums, **self.data, **self.state.state_dict()}
        refuse_non_finite(full)
        return full

    def draw_grid(self) -> None:
        """A sheet of real images and samples from the seeds 0, 1, ..., see ``runners.training.grids``. Rank 0.

        A chain that diverges leaves it out: training may be well, and no other rank draws.
        """
        self.first_grid_due = False
        if self.training.sample_num:
            with self.monitor.paused():
                log.info("drawing samples/%07d.png", self.step)             # may take minutes on a CPU
                try:
                    with nullcontext() if self.finished else self.signals.abandonable():     # all is saved: it may wait
                        sheet = training_sheet(self.diffusion, self.images)
                    self.monitor.grid(sheet, self.step)
                except DivergedError as error:
                    log.warning("no samples/%07d.png: %s", self.step, error)
                except Abandoned:
                    log.warning("no samples/%07d.png: a signal came", self.step)

    def finish(self) -> None:
        """Wait for the last write. Collective."""
        distributed.on_rank_zero(self.writer.close)
