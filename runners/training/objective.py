"""What a network is trained on: all that is drawn for a shard, and its loss."""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from configs.schema import Config
from datasets.latents import choose_variant
from functions.augment import Draws, augment
from functions.denoiser import Denoiser
from functions.losses import sequence_aware_loss
from functions.pixels import random_flip
from functions.training_remedies import Rollout, ramp_up, scheduled_noise, slowed_times
from functions.variational import Transitions, with_bound
from runners.conditioning import hide
from runners.network import Network


class Draw(NamedTuple):
    """A shard and all its randomness."""

    x0: Tensor                          # (B, C, H, W)
    condition: dict[str, Tensor]        # labels long (B,), -1 where hidden; augment (B, 9); what prompts mean
    t: Tensor                           # (B,)
    importance: Tensor | None           # (B,), None: 1
    noise: Tensor                       # (K, B, C, H, W)
    xi: Tensor | None                   # of that shape
    rollout: Rollout | None = None      # of scheduled sampling
    slow: Tensor | None = None          # float64 (B,) in [0, 1)


class Objective:
    """The loss that a configuration asks for.

    Args:
        schedule, codec: Of the chain, and between pixels and what is diffused.
        device: Where all is drawn.
    """

    def __init__(self, config: Config, schedule, codec, device: torch.device):
        self.config, self.schedule, self.codec, self.device = config, schedule, codec, device

    def draw(self, images: Tensor, condition: dict[str, Tensor], times, generator: torch.Generator,
             progress: float = 1.0, prompts=None) -> Draw:
        """All randomness of a shard but dropout; what is optional comes last, so that without it nothing changes.

        Args:
            images: uint8 (B, C, H, W); or moments of latents in variants, float (B, V, 2, c, h, w).
            condition: By name, such as ``labels`` long (B,).
            times: What draws the times of a batch: ``draw(size, generator) -> (t, importance)``.
            progress: Share of the run that is done, in [0, 1].
            prompts: Of a text-to-image network: what stands where a condition is hidden.
        """
        config, loss = self.config, self.config.loss
        if images.is_floating_point():
            images, condition = choose_variant(images, condition, generator)
        elif config.data.random_flip:
            images = random_flip(images, generator)
        x0 = self.codec.encode(images, generator)
        t, importance = times.draw(len(x0), generator)
        shape = (loss.terms, *x0.shape)
        noise = torch.randn(shape, generator=generator, device=self.device)
        xi = torch.randn(shape, generator=generator, device=self.device) if loss.input_perturbation > 0 else None
        if condition and config.training.label_dropout:
            hidden = torch.rand(len(x0), generator=generator, device=self.device) < config.training.label_dropout
            condition = hide(condition, hidden, prompts)
        if config.data.augment:
            x0, told = augment(x0, config.data.augment, Draws(generator))
            condition = {**condition, "augment": told}
        return Draw(x0, condition, t, importance, noise, *self._draw_remedies(noise, xi, generator, progress))

    def _draw_remedies(self, noise: Tensor, xi: Tensor | None, generator, progress: float) -> tuple:
        """(xi, rollout, slow) of a ``Draw``."""
        loss, rollout, slow = self.config.loss, None, None

        def uniform():
            return torch.rand(noise.shape[1], generator=generator, device=self.device)         # (B,)

        if loss.input_perturbation_probability < 1:
            xi = xi * (uniform() < loss.input_perturbation_probability).view(-1, 1, 1, 1)
        if scheduled := loss.scheduled_sampling:
            chosen = uniform() < ramp_up(scheduled.probability, scheduled.ramp, progress)
            shape = (scheduled.steps, *noise.shape)
            rollout = Rollout(chosen, torch.randn(shape, generator=generator, device=self.device))
        if loss.slow_flow:
            slow = uniform().double()
        return xi, rollout, slow

    def loss(self, denoiser: Denoiser, batch: Draw):
        """LossTerms of a shard as the configuration weighs them; the importance of its times is not in them."""
        loss, given, noise, shown = self.config.loss, denoiser.given(batch.condition), batch.noise, None
        if batch.rollout is not None:
            alone = given.calling(given.network.alone()) if isinstance(given.network, Network) else given
            noise = scheduled_noise(alone, batch.x0, batch.t, noise, batch.rollout, loss.scheduled_sampling.min_level)
        if batch.slow is not None:
            def shown(times):
                u = batch.slow.repeat(len(times) // len(batch.slow))
                return slowed_times(self.schedule, times, u, loss.slow_flow)
        terms = sequence_aware_loss(
            given, batch.x0, batch.t, noise, num_consecutive_steps=loss.num_consecutive_steps, lamda=loss.lamda,
            input_perturbation=loss.input_perturbation, perturbation_noise=batch.xi,
            perturbation_target=loss.perturbation_target, weight=loss.weight, reduce=loss.reduce, shown=shown)
        if loss.variational == "none":
            return terms
        return with_bound(terms, loss.variational, given, self.transitions, batch.x0, batch.t)

    @cached_property
    def transitions(self) -> Transitions:
        """Of all steps of the schedule, for the variational bound."""
        return Transitions(self.schedule, range(self.schedule.num_timesteps)).to(self.device)
