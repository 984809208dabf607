"""What EDM does in a step and in a chain, written plainly: float32 in NCHW, hand-written attention, resampling by
depthwise convolutions, a loss for each pixel, gradients made finite one parameter after another, Adam and the average
with torch's defaults; sampling in float64 with a generator for each image and the PNG files at the end.

The augmentation is this project's own: the same transformations, which a plain reading would only write down again.
"""

import copy
import itertools
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.reference import build_reference, endless, follow, to_pixels
from configs.schema import Config
from functions.augment import Draws, augment

SIGMA_DATA, P_MEAN, P_STD = 0.5, -1.2, 1.2


def denoise(network, y: Tensor, sigma: Tensor, told: Tensor | None = None) -> Tensor:
    """D(y; sigma) in float32. ``y`` (B, C, H, W), ``sigma`` (B, 1, 1, 1)."""
    y, sigma = y.float(), sigma.float()
    total = sigma**2 + SIGMA_DATA**2
    condition = {} if told is None else {"augment": told}
    F = network(y / total.sqrt(), sigma.log().flatten() / 4, **condition)
    return SIGMA_DATA**2 / total * y + sigma * SIGMA_DATA / total.sqrt() * F


def pixel_losses(network, x0: Tensor, sigma: Tensor, noise: Tensor, told: Tensor | None) -> Tensor:
    """EDM's weighted square error, (B, C, H, W)."""
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    return weight * (denoise(network, x0 + sigma * noise, sigma, told) - x0) ** 2


class ReferenceEDMTraining:
    """Call it for one step of edm/cifar10_ddpmpp.yml; the arguments are ``ReferenceTraining``'s."""

    def __init__(self, config: Config, folder: Path, device, workers: int = 2):
        self.config, self.device = config, torch.device(device)
        self.network = build_reference(config, device).train()
        self.average = copy.deepcopy(self.network)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=config.optim.lr)
        self.draws = Draws(torch.Generator(device))
        self.batches, self.images = endless(folder, config, self.device, workers), 0

    def __call__(self) -> int:
        config, x0 = self.config, next(self.batches).to(self.device)
        size = config.training.micro_batch_size or len(x0)
        self.optimizer.zero_grad(set_to_none=True)
        for part in x0.split(size):
            sigma = (torch.randn(len(part), 1, 1, 1, device=self.device) * P_STD + P_MEAN).exp()
            part, told = augment(part, config.data.augment, self.draws)
            losses = pixel_losses(self.network, part, sigma, torch.randn_like(part), told)
            (losses.sum() / len(x0)).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = config.optim.lr * min(self.images / config.optim.warmup_images, 1)
        for parameter in self.network.parameters():
            torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        self.optimizer.step()
        average = config.training.ema[0]
        half_life = max(min(average.half_life, average.ramp_up * self.images), 1e-8)
        follow(self.average, self.network, 0.5 ** (len(x0) / half_life))
        self.images += len(x0)
        return len(x0)


def levels(steps: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """sigma_0 = high .. sigma_{N-1} = low, then 0, float64 (N + 1,)."""
    i = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    return torch.cat([(high ** (1 / rho) + i * (low ** (1 / rho) - high ** (1 / rho))) ** rho, torch.zeros(1)])


@torch.no_grad()
def sample_heun(network, latents: Tensor, steps: int) -> Tensor:
    """Algorithm 2 without churn, from standard normal ``latents`` (B, C, H, W); 2 steps - 1 calls."""
    sigmas = levels(steps).to(latents.device)
    x = latents.double() * sigmas[0]
    for i in range(steps):
        now, after = (sigma.reshape(1, 1, 1, 1).expand(len(x), 1, 1, 1) for sigma in sigmas[i:i + 2])
        x = x + 0.0 * torch.randn_like(x)                      # it draws without churn too
        slope = (x - denoise(network, x, now).double()) / now
        ahead = x + (after - now) * slope
        if i < steps - 1:
            ahead = x + (after - now) * (slope + (ahead - denoise(network, ahead, after).double()) / after) / 2
        x = ahead
    return x


def reference_edm_sampling(config: Config, device, settings, batch: int, folder: Path):
    """Each call writes ``batch`` PNG files. ``settings.timesteps`` of Heun's method."""
    network, numbers = build_reference(config, device).eval(), itertools.count()

    def sample() -> int:
        generators = [torch.Generator(device).manual_seed(seed) for seed in range(batch)]
        latents = torch.stack([torch.randn(config.data.shape, generator=each, device=device) for each in generators])
        target = folder / f"reference {next(numbers)}"
        target.mkdir()
        for number, pixels in enumerate(to_pixels(sample_heun(network, latents, settings.timesteps).cpu())):
            Image.fromarray(pixels).save(target / f"{number:06d}.png")
        return batch

    return sample
