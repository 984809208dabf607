"""The runner: trains, resumes, loads weights and samples. Scripts and notebooks use this one class."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from configs.schema import Config, load_config
from datasets.packed import open_images
from functions.denoising import OPTIONS, SAMPLERS
from functions.losses import sequence_aware_loss
from functions.pixels import from_model_range, random_flip, to_model_range, to_uint8
from functions.rng import SeededNoise, seeded, shard_generator
from functions.schedule import NoiseSchedule
from functions.timesteps import sampling_timesteps, training_timesteps
from models import build_model, load_weights
from runners import distributed
from runners.network import Network, explain_out_of_memory, memory_format, resolve_amp, resolve_compile
from runners.training.checkpoint import FORMAT_VERSION, CheckpointWriter, RunFolder, refuse_non_finite
from runners.training.monitor import Monitor, log_to_file
from runners.training.periodic_fid import PeriodicFid
from runners.training.plan import Plan
from runners.training.state import TrainingState
from utils.errors import Interrupted, UserError, choose

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    seeds: list[int]
    images: Tensor           # (B, C, H, W) float in [0, 1]


class TrainResult(NamedTuple):
    step: int                # optimizer steps done, over all calls
    epoch: int               # epochs completed
    loss: float | None       # mean of the last logging interval
    checkpoint: Path


class Diffusion:
    """A network, its noise schedule and what is done with them.

    Args:
        config: All settings.
        device: Where to compute; default: the GPU if there is one.

    Attributes:
        model: The bare network. Sampling uses ``ema`` where there is one, that is during and after ``train``.
        amp: Autocast type for sampling, or None.
        compiled: Whether sampling compiles the network.
        weights: WeightsInfo of the loaded file, or None.
    """

    def __init__(self, config: Config, device=None):
        self.config = config
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.schedule = NoiseSchedule.from_config(config.diffusion).to(self.device)
        with seeded(config.training.seed):
            self.model = build_model(config)
        self.model.checkpointing = config.training.activation_checkpointing
        self.model.to(self.device, memory_format=memory_format(self.device, config.model.ch))
        self.ema = self.weights = self.amp = self._images = self._held_out = None
        self.compiled = False

    @classmethod
    def from_run(cls, folder, ckpt_id: int | None = None, ema: bool = True, device=None) -> "Diffusion":
        """Network and weights of a run folder of this program, SA-DPM or DDIM.

        Args:
            folder: exp/logs/DOC, with its config.yml.
            ckpt_id: Epoch; none: sampling.ckpt_id, else the newest.
            ema: Averaged rather than raw weights.

        Raises:
            UserError: No configuration or no such checkpoint. DataError: A broken one.
        """
        run = RunFolder(folder)
        if not run.config.exists():
            raise UserError(f"{run.config} not found; is {folder} the folder of a run?")
        diffusion = cls(load_config(run.config), device)
        default = diffusion.config.sampling.ckpt_id
        diffusion.load(run.weights(default if ckpt_id is None else ckpt_id, ema), ema)
        return diffusion

    def load(self, path: str | Path, ema: bool = True) -> None:
        """Load weights in any format that ``models.load_weights`` knows."""
        self.weights = load_weights(self.model, path, ema=ema)
        self.ema = None

    # ------------------------------------------------------------------------------------------------------- training

    def train(self, run: RunFolder, *, resume: bool = False, max_steps: int | None = None,
              signals: distributed.Signals | None = None) -> TrainResult:
        """Train to the end of the configured run, or to ``max_steps`` if that comes first.

        Args:
            run: Where checkpoints, metrics and samples go.
            resume: Continue from the newest checkpoint, if there is one.
            max_steps: Optimizer steps, counted from the start of the run.
            signals: Those the caller listens to already; default: SIGINT, SIGTERM and SIGUSR1.

        Raises:
            UserError: The configuration asks for something impossible. DataError: Bad data.
            DivergedError: Too many steps in a row without a finite gradient; nothing is saved.
            Interrupted: A signal arrived; everything is saved. SaveError: The last state could not be.
        """
        training = self.config.training
        images = self.open_training_images(run)
        plan = Plan.make(training, images.num_images, distributed.world_size(), distributed.rank(), max_steps)
        with (log_to_file(run), nullcontext(signals) if signals else distributed.Signals().listening() as signals,
              explain_out_of_memory(), ExitStack() as held):
            if run.comment:
                log.info("comment: %s", run.comment)
            network, state = self.prepare_training(plan)
            stored = self._restore(run, state) if resume else {}
            step, best = stored.get("step", 0), stored.get("best_fid")
            writer = held.enter_context(
                CheckpointWriter(run, training.keep_last, training.keep_every, stored.get("snapshots", [])))
            monitor = Monitor(run, plan, self.device, step, stored.get("metric_sums"))
            self._open_held_out(run)
            fid = PeriodicFid(self.config, self.device) if training.fid_freq else None
            batches = images.batches(plan.index_lists(step))
            event, line, saved_at = 0, {}, time.monotonic()
            while step < plan.last_step and event <= signals.SAVE:
                self.train_step(network, state, batches, plan, step, monitor)
                step += 1
                if step % training.log_freq == 0 or step == plan.last_step:
                    line = monitor.publish(step, state.lr)
                if step % min(training.log_freq, training.max_bad_steps) == 0 or step == plan.last_step:
                    state.check_divergence(step)
                if self._held_out and step % training.validation_freq == 0:
                    monitor.scalar("validation_loss", self.validation_loss(self._held_out), step)
                snapshot = plan.snapshot(step, training)
                if plan.fid_due(step, training):
                    best = self._measure_fid(fid, snapshot, step, best, monitor)
                due = 0 < training.checkpoint_minutes * 60 < time.monotonic() - saved_at
                event = signals.vote(due)
                if due or snapshot is not None:
                    saved_at = time.monotonic()
                if event or snapshot is not None or step == plan.last_step:
                    full = self._full_state(state, plan, step, best, monitor)
                    if distributed.rank() == 0:
                        writer.save(full, snapshot)
                    if event <= signals.SAVE and (snapshot is not None or step == plan.last_step):
                        self._sample_grid(monitor, snapshot or step // plan.steps_per_epoch, step)
            monitor.close()
            distributed.on_rank_zero(writer.close)
        if event > signals.SAVE:
            raise Interrupted(event, f"stopped by signal {event} after step {step}; saved, --resume_training continues")
        return TrainResult(step, step // plan.steps_per_epoch, line.get("loss"), run.path / "ckpt.pth")

    def open_training_images(self, run: RunFolder):
        """The ImageStore of ``train``, opened and packed by the first call. DataError: bad, or less than a batch."""
        if self._images is None:
            images = open_images(self.config, run.datasets, "train", self.device)
            Plan.make(self.config.training, images.num_images, distributed.world_size())
            self._images = images
        return self._images

    def train_step(self, network: Network, state: TrainingState, batches: Iterator[Tensor], plan: Plan, step: int,
                   monitor: Monitor) -> None:
        """One optimizer step on this rank's shards of the global batch."""
        loss = self.config.loss
        if not self.model.training:                  # pictures and validation in between leave it in eval mode
            self.model.train()
        for shard in plan.shards():
            x0, t, noise, xi = self.draw(next(batches), shard_generator(plan.seed, step, shard, self.device))
            with network.gradient_sync(now=shard == plan.shards()[-1]):
                terms = sequence_aware_loss(
                    network, self.schedule, x0, t, noise, num_consecutive_steps=loss.num_consecutive_steps,
                    lamda=loss.lamda, input_perturbation=loss.input_perturbation, perturbation_noise=xi)
                state.scaler.scale(terms.total.mean() / plan.accumulate).backward()
            monitor.add(terms, t, self.schedule.num_timesteps)
        monitor.step_done(*state.update())

    def draw(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """All randomness of a shard but dropout; the perturbation comes last, so that gamma = 0 changes nothing.

        Args:
            images: uint8 (B, C, H, W).

        Returns:
            x0 (B, C, H, W), t (B,), noise (K, B, C, H, W), perturbation noise of that shape or None.
        """
        data, loss = self.config.data, self.config.loss
        if data.random_flip:
            images = random_flip(images, generator)
        x0 = to_model_range(images, data, generator)
        t = training_timesteps(len(x0), self.schedule.num_timesteps, generator)
        shape = (loss.num_consecutive_steps if loss.lamda > 0 else 1, *x0.shape)
        noise = torch.randn(shape, generator=generator, device=self.device)
        xi = torch.randn(shape, generator=generator, device=self.device) if loss.input_perturbation > 0 else None
        return x0, t, noise, xi

    @torch.no_grad()
    def validation_loss(self, images) -> float:
        """Plain DDPM loss of the averaged weights on an ImageStore, with the same noise at every call."""
        network = Network(self._sampling_model(), self.device, self.amp)
        generator = torch.Generator(self.device).manual_seed(0)
        num, total = min(self.config.training.validation_num, images.num_images), 0.0
        for batch in images.batches(torch.arange(num).split(self.config.sampling.batch_size)):
            x0 = to_model_range(batch, self.config.data, generator)
            t = training_timesteps(len(x0), self.schedule.num_timesteps, generator)
            noise = torch.randn((1, *x0.shape), generator=generator, device=self.device)
            total += float(sequence_aware_loss(network, self.schedule, x0, t, noise, lamda=0.0).total.sum())
        return total / num

    def _open_held_out(self, run: RunFolder) -> None:
        def open_on_rank_zero():
            self._held_out = open_images(self.config, run.datasets, "test", self.device)

        if self.config.training.validation_freq:
            distributed.on_rank_zero(open_on_rank_zero)

    def prepare_training(self, plan: Plan) -> tuple[Network, TrainingState]:
        """The network to differentiate, and what a step changes."""
        training = self.config.training
        amp = resolve_amp(training.amp, self.device)
        state = TrainingState(self.model, self.config, plan.total_steps, loss_scaling=amp is torch.float16)
        self.ema = state.ema
        compiled = resolve_compile(training.compile, self.device, plan.last_step)
        log.info("%d images, %d steps in an epoch, %d in this run; batch %d = %d processes x %d calls x %d images; "
                 "%s, amp %s, compile %s", plan.num_images, plan.steps_per_epoch, plan.last_step, plan.global_batch,
                 plan.world_size, plan.accumulate, plan.micro_batch, self.device, amp or "off",
                 "on" if compiled else "off")
        return Network(self.model, self.device, amp, compiled=compiled, ddp=plan.world_size > 1,
                       accumulate=plan.accumulate), state

    def _restore(self, run: RunFolder, state: TrainingState) -> dict:
        """Continue from the newest full state that is whole; an empty dictionary where there is none.

        Raises:
            UserError: The ranks do not see the same run folder.
        """
        found = run.load_newest()
        if len(set(distributed.gather_objects(found and found[0]["step"]))) > 1:
            raise UserError(f"the ranks find different checkpoints in {run.path}; it must lie on a shared file system")
        if found is None:
            return {}
        stored, path = found
        state.load_state_dict(stored)
        log.info("resumed from %s: step %d, epoch %d", path, stored["step"], stored["epoch"])
        return stored

    def _full_state(self, state: TrainingState, plan: Plan, step: int, best: dict | None, monitor: Monitor) -> dict:
        """All that resuming needs. Collective, because the sums of all ranks belong into it.

        Raises:
            DivergedError: On all ranks alike: a weight or a moment is not finite.
        """
        full = {"format_version": FORMAT_VERSION, "config": self.config.model_dump(mode="json"), "step": step,
                "epoch": step // plan.steps_per_epoch, "best_fid": best, "metric_sums": monitor.state(),
                **state.state_dict()}
        refuse_non_finite(full)
        return full

    def _measure_fid(self, fid: PeriodicFid, snapshot: int | None, step: int, best: dict | None,
                     monitor: Monitor) -> dict:
        """Log the FID; returns the best one so far, whose snapshot is kept."""
        results = fid.measure(self)
        if best is None or results["fid"] < best["fid"]:
            best = {"fid": results["fid"], "snapshot": snapshot, "step": step}
        if distributed.rank() == 0:
            monitor.scalar("fid", results["fid"], step)
            log.info("%s %.4f; the best so far: %.4f at step %d", results["name"], results["fid"], best["fid"],
                     best["step"])
        return best

    def _sample_grid(self, monitor: Monitor, epoch: int, step: int) -> None:
        """A picture of EMA samples from the seeds 0, 1, ..."""
        training = self.config.training
        if training.sample_num and distributed.rank() == 0:
            batches = self.sample(range(training.sample_num), timesteps=training.sample_timesteps)
            monitor.grid(to_uint8(torch.cat([batch.images for batch in batches])), epoch, step)

    # ------------------------------------------------------------------------------------------------------- sampling

    def _sampling_model(self):
        return (self.ema.module if self.ema else self.model).eval()

    def sample(self, seeds: Sequence[int], *, timesteps: int | str = 100, eta: float = 0.0,
               sample_type: str = "generalized", skip_type: str = "uniform", var_type: str = "fixedlarge",
               eps_scaler=None, clip_denoised: bool | None = None, batch_size: int | None = None,
               callback=None, churn=None) -> Iterator[Batch]:
        """Generate one image for each seed, batch by batch.

        Args:
            seeds: Image s depends on the weights, s and the settings below, not on the batch it is made in.
            timesteps: Number of steps, or a respacing; see ``functions.timesteps.sampling_timesteps``.
            eta: 0 (DDIM) to 1, for ``generalized``.
            sample_type: Name in ``functions.denoising.SAMPLERS``.
            skip_type: How the steps are spaced.
            var_type: fixedlarge or fixedsmall, for ``ddpm_noisy``.
            eps_scaler: None, b or (k, b).
            clip_denoised: Clamp the estimates of x0; None: only for ``ddpm_noisy``.
            batch_size: Images at a time; default: sampling.batch_size.
            callback: See ``functions.denoising.generalized_steps``.
            churn: None, s_churn or (s_churn, s_min, s_max, s_noise), for ``heun`` and ``euler``.

        Raises:
            UserError: An unknown sampler. ValueError: A setting out of range.
        """
        chain = self.chain(timesteps=timesteps, eta=eta, sample_type=sample_type, skip_type=skip_type,
                           var_type=var_type, eps_scaler=eps_scaler, clip_denoised=clip_denoised, churn=churn)
        seeds, size = list(seeds), batch_size or self.config.sampling.batch_size
        for start in range(0, len(seeds), size):
            chunk = seeds[start:start + size]
            noise = SeededNoise(chunk, self.device)
            shape = (len(chunk), *self.config.data.shape)
            yield Batch(chunk, chain(noise.randn(shape), noise, callback))

    def steps(self, timesteps: int | str, skip_type: str = "uniform") -> list[int]:
        """The steps that a chain visits, ascending."""
        return sampling_timesteps(self.schedule.num_timesteps, timesteps, skip_type, self.schedule)

    def network(self) -> Network:
        """eps(x, t) as sampling calls it."""
        return Network(self._sampling_model(), self.device, self.amp, compiled=self.compiled)

    def chain(self, *, timesteps, eta=0.0, sample_type="generalized", skip_type="uniform", var_type="fixedlarge",
              eps_scaler=None, clip_denoised=None, churn=None):
        """A function (x, SeededNoise, callback=None, start=None) -> images in [0, 1], both (B, C, H, W).

        ``start``, a step of the list, enters the chain there instead of at the highest noise.
        """
        sampler = choose(SAMPLERS, sample_type, "sample_type")
        steps = self.steps(timesteps, skip_type)
        options = {"eta": eta, "var_type": var_type, "churn": churn}
        own = {key: value for key, value in options.items() if key in OPTIONS[sample_type]}
        clip = sample_type == "ddpm_noisy" if clip_denoised is None else clip_denoised
        network = self.network()

        def run(x: Tensor, noise: SeededNoise, callback=None, start: int | None = None) -> Tensor:
            visited = steps if start is None else steps[:steps.index(start) + 1]
            x = sampler(network, self.schedule, x, visited, eps_scaler=eps_scaler, clip_denoised=clip,
                        noise_fn=lambda index: noise.randn(x.shape), callback=callback, **own)
            return from_model_range(x, self.config.data)

        return run
