"""What guided-diffusion and DDPM-IP do in a step and in a chain, written plainly and without speed.

Float32 in NCHW, hand-written attention, coefficients looked up in NumPy tables in each call, xi drawn also where gamma
is 0, losses brought to the host for loss-second-moment sampling and for the log, norms of gradients and parameters
taken one by one, AdamW and averages with torch's defaults; sampling ends in one npz. Its half precision is left out: a
CPU has none of it, and what ours is compared with must be one thing on all devices.
"""

import copy
import itertools
import logging
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.reference import build_reference, endless, follow, to_pixels
from configs.schema import Config

log = logging.getLogger(__name__)


class Process:
    """Tables of a cosine chain of T steps, float64; ``at`` looks one up."""

    def __init__(self, T: int):
        f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
        self.abar = np.cumprod(1 - beta)
        before = np.append(1.0, self.abar[:-1])
        variance = beta * (1 - before) / (1 - self.abar)
        self.log_small, self.log_large = np.log(np.append(variance[1], variance[1:])), np.log(beta)
        self.of_x0 = beta * np.sqrt(before) / (1 - self.abar)
        self.of_x = (1 - before) * np.sqrt(1 - beta) / (1 - self.abar)

    @staticmethod
    def at(table: np.ndarray, k: Tensor) -> Tensor:
        """float32 (B, 1, 1, 1)."""
        return torch.from_numpy(table).to(k.device)[k].float().reshape(-1, 1, 1, 1)

    def x0_of(self, x: Tensor, eps: Tensor, k: Tensor) -> Tensor:
        return self.at(np.sqrt(1 / self.abar), k) * x - self.at(np.sqrt(1 / self.abar - 1), k) * eps


def hybrid_loss(network, process: Process, x0: Tensor, k: Tensor, noise: Tensor, xi: Tensor, gamma: float) -> Tensor:
    """mse + vb of each image, (B,), with input perturbation. ``k`` long (B,), the rest (B, C, H, W)."""
    at, abar = process.at, process.abar
    x = at(np.sqrt(abar), k) * x0 + at(np.sqrt(1 - abar), k) * (noise + gamma * xi)
    eps, v = network(x, k.float()).chunk(2, dim=1)
    u = (v + 1) / 2
    log_variance = u * at(process.log_large, k) + (1 - u) * at(process.log_small, k)
    truth = at(process.of_x0, k) * x0 + at(process.of_x, k) * x
    mean = at(process.of_x0, k) * process.x0_of(x, eps.detach(), k) + at(process.of_x, k) * x
    difference = log_variance - at(process.log_small, k)
    kl = 0.5 * (difference - 1 + torch.exp(-difference) + (truth - mean) ** 2 * torch.exp(-log_variance))
    nats = torch.where(k.reshape(-1, 1, 1, 1) == 0, -level_likelihood(x0, mean, log_variance), kl)
    return ((noise - eps) ** 2).mean(dim=(1, 2, 3)) + nats.mean(dim=(1, 2, 3)) / math.log(2)


def level_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the mass on the 8-bit level of x0, in nats."""
    def below(z):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    scale = torch.exp(-0.5 * log_variance)
    high, low = below(scale * (x0 - mean + 1 / 255)), below(scale * (x0 - mean - 1 / 255))
    mass = torch.where(x0 < -0.999, high, torch.where(x0 > 0.999, 1 - low, high - low))
    return mass.clamp(min=1e-12).log()


class SecondMoments:
    """The last ten losses of each step, and draws by them."""

    def __init__(self, T: int):
        self.losses, self.counts = np.zeros((T, 10)), np.zeros(T, dtype=int)

    def probabilities(self) -> np.ndarray:
        weights = np.ones(len(self.counts))
        if (self.counts == 10).all():
            weights = np.sqrt((self.losses**2).mean(axis=1))
            weights = 0.999 * weights / weights.sum() + 0.001 / len(weights)
        return weights / weights.sum()

    def draw(self, batch: int, device) -> tuple[Tensor, Tensor]:
        p = self.probabilities()
        k = np.random.default_rng().choice(len(p), size=batch, p=p)
        return torch.from_numpy(k).to(device), torch.from_numpy(1 / (len(p) * p[k])).float().to(device)

    def update(self, k: Tensor, losses: Tensor) -> None:
        for step, loss in zip(k.tolist(), losses.tolist(), strict=True):
            if self.counts[step] == 10:
                self.losses[step] = np.append(self.losses[step, 1:], loss)
            else:
                self.losses[step, self.counts[step]] = loss
                self.counts[step] += 1


class ReferenceADMTraining:
    """Call it for one step of a configuration such as adm/cifar10_ip.yml; the arguments are ``ReferenceTraining``'s."""

    def __init__(self, config: Config, folder: Path, device, workers: int = 2):
        self.config, self.device = config, torch.device(device)
        self.network = build_reference(config, device).train()
        self.average = copy.deepcopy(self.network)
        self.process = Process(config.diffusion.num_steps)
        self.moments = SecondMoments(config.diffusion.num_steps)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=config.optim.lr, weight_decay=0)
        self.batches, self.step = endless(folder, config, self.device, workers), 0

    def __call__(self) -> int:
        x0 = next(self.batches).to(self.device)
        size = self.config.training.micro_batch_size or len(x0)
        self.optimizer.zero_grad()
        for part in x0.split(size):                            # gradients are summed
            k, importance = self.moments.draw(len(part), self.device)
            noise, xi = torch.randn_like(part), torch.randn_like(part)
            losses = hybrid_loss(self.network, self.process, part, k, noise, xi, self.config.loss.input_perturbation)
            self.moments.update(k, losses.detach())
            (importance * losses).mean().backward()
        norms = [math.sqrt(sum(float(tensor.norm()) ** 2 for tensor in tensors)) for tensors in (
            [p.grad for p in self.network.parameters()], [p.detach() for p in self.network.parameters()])]
        self.step += 1
        log.info("step %d, loss %f, norms %s", self.step, losses.mean().item(), norms)
        self.optimizer.step()
        follow(self.average, self.network, self.config.training.ema[0].rate)
        return len(x0)


@torch.no_grad()
def sample_ddim(network, process: Process, x: Tensor, timesteps: list[int]) -> Tensor:
    """DDIM with eta 0 and clipped estimates from noise ``x`` (B, C, H, W) along ascending ``timesteps``."""
    for k, before in zip(reversed(timesteps), [*reversed(timesteps[:-1]), -1], strict=True):
        t = torch.full((len(x),), k, device=x.device)
        eps = network(x, t.float())[:, :x.shape[1]]
        x0 = process.x0_of(x, eps, t).clamp(-1, 1)
        eps = (process.at(np.sqrt(1 / process.abar), t) * x - x0) / process.at(np.sqrt(1 / process.abar - 1), t)
        abar = process.abar[before] if before >= 0 else 1.0
        x = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * eps + 0.0 * torch.randn_like(x)       # it draws at eta 0 too
    return x


def reference_adm_sampling(config: Config, device, settings, batch: int, folder: Path):
    """Each call writes one npz of ``batch`` images. ``settings.timesteps`` of DDIM, such as ddim25."""
    network, process = build_reference(config, device).eval(), Process(config.diffusion.num_steps)
    stride = math.ceil(config.diffusion.num_steps / int(settings.timesteps.removeprefix("ddim")))
    timesteps, numbers = list(range(0, config.diffusion.num_steps, stride)), itertools.count()

    def sample() -> int:
        images = sample_ddim(network, process, torch.randn(batch, *config.data.shape, device=device), timesteps)
        np.savez(folder / f"reference {next(numbers)}.npz", to_pixels(images.cpu()))
        return batch

    return sample
