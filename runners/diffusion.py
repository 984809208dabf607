"""The runner: trains, resumes, loads weights and samples. Scripts and notebooks use this one class."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from configs.schema import Config, load_config
from datasets.packed import open_images
from functions.denoising import OPTIONS, SAMPLERS
from functions.losses import sequence_aware_loss
from functions.pixels import from_model_range, random_flip, to_model_range, to_uint8
from functions.rng import SeededNoise, seeded, shard_generator
from functions.schedule import NoiseSchedule
from functions.timesteps import sampling_timesteps, training_timesteps
from models import build_model, load_weights, make_ema
from runners import distributed
from runners.checkpoint import FORMAT_VERSION, RunFolder
from runners.monitor import Monitor, log_to_file
from runners.network import Network, resolve_amp, resolve_compile
from runners.optimizer import make_lr_schedule, make_optimizer
from runners.plan import Plan
from utils.errors import DivergedError, Interrupted, UserError, choose

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
        self.model.to(self.device, memory_format=torch.channels_last)
        self.ema = self.weights = self.amp = None
        self.compiled = False

    @classmethod
    def from_run(cls, folder, ckpt_id: int | None = None, ema: bool = True, device=None) -> "Diffusion":
        """Network and weights of a run folder of this program, SA-DPM or DDIM.

        Args:
            folder: exp/logs/DOC, with its config.yml.
            ckpt_id: Epoch; none: the newest.
            ema: Averaged rather than raw weights.

        Raises:
            UserError: No configuration or no such checkpoint. DataError: A broken one.
        """
        run = RunFolder(folder)
        if not run.config.exists():
            raise UserError(f"{run.config} not found; is {folder} the folder of a run?")
        diffusion = cls(load_config(run.config), device)
        diffusion.load(run.weights(ckpt_id, ema), ema)
        return diffusion

    def load(self, path: str | Path, ema: bool = True) -> None:
        """Load weights in any format that ``models.load_weights`` knows."""
        self.weights = load_weights(self.model, path, ema=ema)

    # ------------------------------------------------------------------------------------------------------- training

    def train(self, run: RunFolder, *, resume: bool = False, max_steps: int | None = None) -> TrainResult:
        """Train to the end of the configured run, or to ``max_steps`` if that comes first.

        Args:
            run: Where checkpoints, metrics and samples go.
            resume: Continue from the newest checkpoint, if there is one.
            max_steps: Optimizer steps, counted from the start of the run.

        Raises:
            UserError: The configuration asks for something impossible. DataError: Bad data.
            DivergedError: The loss is not finite; nothing is saved.
            Interrupted: A signal arrived; everything is saved.
        """
        training = self.config.training
        images = open_images(self.config, run.datasets, "train", self.device)
        plan = Plan.make(training, images.num_images, distributed.world_size(), distributed.rank(), max_steps)
        with log_to_file(run), distributed.Signals().listening() as signals:
            network = self._prepare_training(plan)
            stored = run.load_newest() if resume else None
            step, sums = self._restore(*stored) if stored else (0, None)
            monitor = Monitor(run, plan, self.device, step, sums)
            held_out = self._held_out(run)
            batches = images.batches(plan.index_lists(step))
            event, line, saved_at = 0, {}, time.monotonic()
            while step < plan.last_step and event <= signals.SAVE:
                self.train_step(network, batches, plan, step, monitor)
                step += 1
                if step % training.log_freq == 0 or step == plan.last_step:
                    line = monitor.publish(step, self.lr_schedule.get_last_lr()[0])
                    if not math.isfinite(line["loss"]):
                        raise DivergedError(f"the loss is {line['loss']} at step {step}; the last checkpoint is kept. "
                                            "Lower optim.lr, or set optim.grad_clip")
                if held_out and step % training.validation_freq == 0:
                    monitor.scalar("validation_loss", self.validation_loss(held_out), step)
                if plan.snapshot_due(step, training):
                    self._snapshot(run, monitor, plan, step)
                    saved_at = time.monotonic()
                event = signals.vote(0 < training.checkpoint_minutes * 60 < time.monotonic() - saved_at)
                if event:
                    self._save(run.save_newest, monitor, plan, step)
                    saved_at = time.monotonic()
            monitor.close()
        if event > signals.SAVE:
            raise Interrupted(event, f"stopped by signal {event} after step {step}; saved, --resume_training continues")
        return TrainResult(step, step // plan.steps_per_epoch, line.get("loss"), run.path / "ckpt.pth")

    def train_step(self, network: Network, batches: Iterator[Tensor], plan: Plan, step: int, monitor: Monitor) -> None:
        """One optimizer step on this rank's shards of the global batch."""
        loss = self.config.loss
        for shard in plan.shards():
            x0, t, noise, xi = self.draw(next(batches), shard_generator(plan.seed, step, shard, self.device))
            with network.gradient_sync(now=shard == plan.shards()[-1]):
                terms = sequence_aware_loss(
                    network, self.schedule, x0, t, noise, num_consecutive_steps=loss.num_consecutive_steps,
                    lamda=loss.lamda, input_perturbation=loss.input_perturbation, perturbation_noise=xi)
                self.scaler.scale(terms.total.mean() / plan.accumulate).backward()
            monitor.add(terms, t, self.schedule.num_timesteps)
        self.scaler.unscale_(self.optimizer)
        grad_norm = clip_grad_norm_(self.model.parameters(), self.config.optim.grad_clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.lr_schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.model)
        monitor.step_done(step + 1, grad_norm)

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

    def _held_out(self, run: RunFolder):
        wanted = self.config.training.validation_freq and distributed.rank() == 0
        return open_images(self.config, run.datasets, "test", self.device) if wanted else None

    def _prepare_training(self, plan: Plan) -> Network:
        """Create what only training needs; returns the network to differentiate."""
        training, model = self.config.training, self.config.model
        amp = resolve_amp(training.amp, self.device)
        self.model.train()
        self.ema = make_ema(self.model, model.ema_rate, model.ema_warmup) if model.ema else None
        self.optimizer = make_optimizer(self.model.parameters(), self.config.optim)
        self.lr_schedule = make_lr_schedule(self.optimizer, self.config.optim, plan.total_steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp is torch.float16)
        compiled = resolve_compile(training.compile, self.device, plan.last_step)
        log.info("%d images, %d steps in an epoch, %d in this run; batch %d = %d processes x %d calls x %d images; "
                 "%s, amp %s, compile %s", plan.num_images, plan.steps_per_epoch, plan.last_step, plan.global_batch,
                 plan.world_size, plan.accumulate, plan.micro_batch, self.device, amp or "off",
                 "on" if compiled else "off")
        return Network(self.model, self.device, amp, compiled=compiled, ddp=plan.world_size > 1)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def state(self, plan: Plan, step: int, sums: list) -> dict:
        """A full state: tensors and plain values only, names without prefixes."""
        return {
            "format_version": FORMAT_VERSION, "config": self.config.model_dump(mode="json"),
            "step": step, "epoch": step // plan.steps_per_epoch,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None, "ema_updates": self.ema.updates if self.ema else 0,
            "optimizer": self.optimizer.state_dict(), "lr_schedule": self.lr_schedule.state_dict(),
            "grad_scaler": self.scaler.state_dict(), "best_fid": None, "metric_sums": sums,
        }

    def _restore(self, state: dict, path: Path) -> tuple[int, list]:
        """Continue from a full state; returns its step and the sums of its logging interval."""
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.load_state_dict(state["ema"], state["ema_updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_schedule.load_state_dict(state["lr_schedule"])
        self.scaler.load_state_dict(state["grad_scaler"])
        log.info("resumed from %s: step %d, epoch %d", path, state["step"], state["epoch"])
        return state["step"], state["metric_sums"]

    def _save(self, write, monitor: Monitor, plan: Plan, step: int, *args) -> None:
        """Collective, because the sums of all ranks belong into the state; rank 0 writes."""
        state = self.state(plan, step, monitor.state())
        if distributed.rank() == 0:
            log.info("saved %s at step %d", write(state, *args), step)

    def _snapshot(self, run: RunFolder, monitor: Monitor, plan: Plan, step: int) -> None:
        """ckpt_{epoch}.pth, model_{epoch}_ema.pth and a sample grid from fixed seeds."""
        training, epoch = self.config.training, step // plan.steps_per_epoch
        self._save(run.save_epoch, monitor, plan, step, epoch)
        if training.sample_num and distributed.rank() == 0:
            batches = self.sample(range(training.sample_num), timesteps=training.sample_timesteps)
            monitor.grid(to_uint8(torch.cat([batch.images for batch in batches])), epoch, step)
            self.model.train()

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
