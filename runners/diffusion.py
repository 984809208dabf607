"""The runner: trains, resumes, loads weights and samples. Scripts and notebooks use this one class."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from configs.pipelines import SCHEDULER, contradictions
from configs.sampling import SamplerSettings
from configs.schema import Config, load_config
from datasets.packed import open_images
from functions.denoiser import Denoiser
from functions.rng import check_seeds, seeded, shard_generator
from functions.schedule import make_schedule
from models import WeightsInfo, build_model, load_profile, load_weights, make_codec, weights_fingerprint
from models.precision import forbid_tf32
from models.pretrained import folder_of
from runners import distributed
from runners.conditioning import PROMPT_STRIDE, StoredPrompts, conditions_of
from runners.latents import open_latent_images
from runners.network import Network, explain_out_of_memory, memory_format
from runners.sampling.flags import checked_settings
from runners.sampling.gamma import read_gamma
from runners.sampling.sampler import Sampler
from runners.sampling.weights import epoch_of, local_weights, stored_config
from runners.signals import Signals
from runners.training.checkpoint import RunFolder, prepared
from runners.training.monitor import log_to_file
from runners.training.objective import Objective
from runners.training.plan import Plan
from runners.training.resuming import Judge, inherit
from runners.training.session import Session
from utils.errors import Interrupted, UserError

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
    """A network, its schedule and what is done with them.

    Args:
        config: All settings.
        device: Where to compute; default: the GPU if there is one.

    Attributes:
        model: The bare network. Sampling uses the first of ``averages`` where there is one: during and after ``train``.
        schedule, codec: Of the chain, and between pixels and what is diffused.
        objective: Draws shards and weighs their losses.
        amp: Autocast type for sampling, or None.
        compiled: Whether sampling compiles the network.
        weights: WeightsInfo of the loaded file, or None.
        guide: Another Diffusion with worse weights, for autoguidance, or None.
        prompts: Of a text-to-image network: what images are made of; see ``runners.conditioning``.
        classifier: ``runners.sampling.classifier.Classifier`` to guide by, or None.
    """

    def __init__(self, config: Config, device=None):
        self.config = config
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda":
            forbid_tf32()                            # neither in what autocast leaves in float32, nor in an autoencoder
        self.schedule, self.codec = make_schedule(config.diffusion), make_codec(config)
        if config.model.arch == "diffusers":
            self._refuse_another_chain(folder_of(config))
        with seeded(config.training.seed):
            self.model = build_model(config)
        self.model.checkpointing = config.training.activation_checkpointing
        self.model.to(self.device, memory_format=memory_format(self.device, config.model.width))
        self.averages, self.weights, self.amp, self.compiled = [], None, None, False
        self.guide = self.classifier = self.prompts = None
        self._images = self.inherited = None
        self.objective = Objective(config, self.schedule, self.codec, self.device)

    @classmethod
    def from_run(cls, folder, ckpt_id: int | None = None, ema: bool = True, device=None,
                 config: Config | None = None) -> "Diffusion":
        """Network and weights of a run folder of this program, SA-DPM or DDIM.

        Args:
            folder: exp/logs/DOC, with its config.yml.
            ckpt_id: Epoch; none: sampling.ckpt_id, else the newest.
            ema: Averaged rather than raw weights.
            config: For folders of other programs that have no config.yml.

        Raises:
            UserError: No configuration or no such checkpoint. DataError: A broken one.
        """
        run = RunFolder(folder)
        if config is None and not run.config.exists():
            raise UserError(f"{run.config} not found; is {folder} the folder of a run? For a folder of another program "
                            "give config=load_config(FILE)")
        diffusion = cls(config or load_config(run.config), device)
        diffusion.load(run.weights(epoch_of(diffusion.config, ckpt_id), ema), ema)
        return diffusion

    @classmethod
    def from_weights(cls, path: str | Path, device=None, overrides: Sequence[str] = ()) -> "Diffusion":
        """A network whose file brings its own configuration, such as EDM's snapshots.

        Args:
            path: A file, or a URL.
            overrides: ``"diffusion.schedule=discrete"``, as for ``load_config``.

        Raises:
            UserError: It brings none. DataError: A broken file, or a network that cannot be rebuilt here.
        """
        path = local_weights(str(path))
        config = stored_config(path, overrides)
        if config is None:
            raise UserError(f"{path} does not say what its network is; use Diffusion(load_config(FILE)).load(PATH)")
        diffusion = cls(config, device)
        diffusion.load(path)
        return diffusion

    def load(self, path: str | Path | None, ema: bool = True) -> None:
        """Load weights in any format that ``models.load_weights`` knows; None: those of the pipeline as they are."""
        if path is None:
            fingerprint = weights_fingerprint(self.model.state_dict())
            self.weights, self.averages = WeightsInfo("pretrained", "unknown", None, None, fingerprint), []
            return
        self._refuse_another_chain(Path(path))
        self.weights = load_weights(self.model, path, ema=ema)
        if self.config.training.snapshot_unit == "steps" and self.weights.step is None:
            self.weights = replace(self.weights, step=self.weights.epoch, epoch=None)      # the number in a file's name
        self.averages = []

    def _refuse_another_chain(self, path: Path) -> None:
        """UserError where a pipeline folder belongs to other betas or another prediction than the configuration."""
        if (path / SCHEDULER).is_file():
            found = contradictions(self.config.diffusion.model_dump(), path)
            if found:
                raise UserError(f"{path / SCHEDULER} contradicts the configuration: {'; '.join(found)}")

    def inherit(self, path: str | Path) -> None:
        """Begin the next ``train`` with weights, average and moments of another run, under this configuration.

        Args:
            path: A full state of this program, SA-DPM or DDIM.

        Raises:
            UserError: It keeps no moments. DataError: A broken file, or one of another network or optimizer.
        """
        self.inherited = inherit(Path(path), self.model, self.config)

    def load_average(self, run: RunFolder, ckpt_id: int | None, length: float) -> None:
        """Make up the average of relative width ``length`` from the power-function averages that a run has kept.

        Args:
            ckpt_id: Epoch at which it ends; none: sampling.ckpt_id, else the newest.
            length: In (0, 0.289).

        Raises:
            UserError: The run has kept none, or a length out of range. DataError: A broken file.
        """
        self.weights = load_profile(self.model, run.profiles(epoch_of(self.config, ckpt_id)), length)
        self.averages = []

    # ------------------------------------------------------------------------------------------------------- training

    def train(self, run: RunFolder | str | Path, *, resume: bool = False, overwrite: bool = False,
              force: bool = False, max_steps: int | None = None,
              signals: Signals | None = None) -> TrainResult:
        """Train to the end of the configured run, or to ``max_steps`` if that comes first.

        Args:
            run: Where checkpoints, metrics and samples go: a folder such as exp/logs/DOC, which is then locked and
                protected as by train_ddp.py; or a RunFolder that the caller has prepared.
            resume: Continue from the newest checkpoint, if there is one.
            overwrite: Move a folder that holds checkpoints aside and start anew.
            force: Resume although the images are others.
            max_steps: Optimizer steps, counted from the start of the run.
            signals: Those the caller listens to already; default: SIGINT, SIGTERM and SIGUSR1.

        Raises:
            UserError: The configuration asks for something impossible, or the folder holds another run.
            DataError: Bad data. DivergedError: Too many steps in a row without a finite gradient; nothing is saved.
            Interrupted: A signal arrived; everything is saved. SaveError: The last state could not be.
        """
        if not isinstance(run, RunFolder):
            run = RunFolder(run)
            self.open_training_images(run)                     # bad data are refused before the folder is touched
            judge = self.judge(run, force) if resume else None
            with prepared(run, self.config, resume=resume, overwrite=overwrite, judge=judge):
                return self.train(run, resume=resume, force=force, max_steps=max_steps, signals=signals)
        images = self.open_training_images(run)
        judge = self.judge(run, force) if resume else None
        plan = Plan.make(self.config.training, images.num_images, distributed.world_size(), distributed.rank(),
                         max_steps)
        with (log_to_file(run), nullcontext(signals) if signals else Signals().listening() as signals,
              explain_out_of_memory(), Session(self, run, plan, images, signals, judge) as session):
            if session.finished:
                log.info("already finished: step %d of %d; to go on give more %s", session.step, plan.last_step,
                         f"training.{self.config.training.limit} or training.max_steps"
                         if plan.last_step == plan.total_steps else "--max_steps")
                return TrainResult(session.step, session.step // plan.steps_per_epoch, None, run.path / "ckpt.pth")
            plan.say_where_it_ends(self.config.training, max_steps)
            session.open()
            while session.goes_on:
                self.train_step(session)
                session.report()
                session.validate()
                session.measure()
                session.save()
            session.finish()
        if session.event > signals.SAVE:
            raise Interrupted(session.event, f"stopped by signal {session.event} after step {session.step}; saved, "
                                             "--resume_training continues")
        return TrainResult(session.step, session.step // plan.steps_per_epoch, session.line.get("loss"),
                           run.path / "ckpt.pth")

    def open_training_images(self, run: RunFolder):
        """The ImageStore of ``train``, opened and packed by the first call. DataError: bad, or less than a batch."""
        if self._images is None:
            images = self.open_images(run.datasets)
            Plan.make(self.config.training, images.num_images, distributed.world_size())
            self.conditions_of(images)
            self._images = images
        return self._images

    def open_images(self, root=None, split: str = "train"):
        """The ImageStore of the configuration: of pixels, or of latents with what prompts mean."""
        if self.codec.bounded or not hasattr(self.codec, "moments"):
            return open_images(self.config, root, split, self.device)
        images = open_latent_images(self.config, self.codec, root, split, self.device)
        if images.empty and self.prompts is None:
            self.prompts = StoredPrompts(images, self.config.data)
        return images

    def conditions_of(self, images) -> Callable[[Tensor], dict[str, Tensor]]:
        """See ``runners.conditioning.conditions_of``."""
        return conditions_of(images, self.config.model.num_labels, self.device, self.weights)

    def judge(self, run: RunFolder, force: bool = False) -> Judge:
        """What a full state must be for this network to go on from it with the images of ``run``."""
        return Judge(self.model, self.config, self.open_training_images(run), force)

    def train_step(self, session: Session) -> None:
        """One optimizer step on this rank's shards of the global batch."""
        plan, state, network = session.plan, session.state, session.network
        denoiser = Denoiser.of(self.config, network, self.schedule)
        if not self.model.training:                  # pictures and validation in between leave it in eval mode
            self.model.train()
        seen = []                                    # (t, loss) of every image, for samplers of times that learn
        for shard in plan.shards():
            batch = self.objective.draw(*next(session.batches), state.times,
                                        shard_generator(plan.seed, session.step, shard, self.device),
                                        session.step / plan.total_steps, self.prompts)
            with network.gradient_sync(now=shard == plan.shards()[-1]):
                terms = self.objective.loss(denoiser, batch)
                if state.times.learns:
                    seen.append(torch.stack([batch.t.double(), terms.total.detach().double()], 1))     # (b, 2)
                if batch.importance is not None:
                    terms = terms._replace(total=batch.importance * terms.total)
                state.scaler.scale(terms.total.mean() / plan.accumulate).backward()
            session.monitor.add(terms, self.schedule.rank(batch.t))
        if seen:                                     # after the step's last draw, from all shards in their order
            t, losses = distributed.gather_rows(torch.cat(seen)).unbind(1)                             # (B,) each
            state.times.update(t.long(), losses)
        session.monitor.step_done(*state.update())
        session.step += 1

    # ------------------------------------------------------------------------------------------------------- sampling

    def sample(self, seeds: Sequence[int], settings: SamplerSettings | None = None, *, batch_size: int | None = None,
               callback=None, **keywords) -> Iterator[Batch]:
        """Generate one image for each seed, batch by batch.

        Args:
            seeds: From 0 to 2^32 - 1, each once; with several prompts as ``runners.conditioning`` numbers them. Image s
                depends on the weights, s and the settings, not on the batch it is made in.
            settings: SamplerSettings; or its fields as keywords, such as ``timesteps=50, eta=1``.
            batch_size: Images at a time; default: sampling.batch_size.
            callback: See ``functions.chain.Chain``.

        Raises:
            UserError: Seeds or settings that are not possible. DivergedError: Images that are not finite.
        """
        try:
            seeds = check_seeds(seeds, PROMPT_STRIDE * (self.prompts.count if self.prompts else 1) - 1)
        except ValueError as error:
            raise UserError(str(error)) from None
        if settings is not None and keywords:
            raise UserError(f"sample: give settings, or their fields as keywords, not both ({', '.join(keywords)})")
        sampler = self.sampler(settings or checked_settings(keywords))
        size = batch_size or self.config.sampling.batch_size
        for start in range(0, len(seeds), size):
            chunk = list(seeds[start:start + size])
            yield Batch(chunk, sampler(chunk, callback))

    def sampler(self, settings: SamplerSettings) -> Sampler:
        """The network with these settings applied to it. UserError: settings that are not possible."""
        guide, gamma = self.guide, settings.gamma and read_gamma(settings.gamma)
        if gamma and self.weights and gamma.weights != self.weights.fingerprint:
            raise UserError(f"--gamma {settings.gamma} was measured on other weights ({gamma.weights}, these are "
                            f"{self.weights.fingerprint}); run diagnose.py gamma with these")
        return Sampler(self.denoiser(), self.codec, settings, self.config, self.device,
                       guide and guide.denoiser(self.schedule), guide.config.model.num_labels if guide else 0,
                       classifier=self.classifier, gamma=gamma, prompts=self.prompts)

    def denoiser(self, schedule=None) -> Denoiser:
        """The network as sampling calls it, on its own schedule or on that of the network which it guides."""
        return Denoiser.of(self.config, self.network(), schedule or self.schedule)

    def network(self) -> Network:
        model = (self.averages[0].module if self.averages else self.model).eval()
        return Network(model, self.device, self.amp, compiled=self.compiled, frozen=True)
