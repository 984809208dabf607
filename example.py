"""The method in one page: train on digits with the sequence-aware loss, and sample, by ``functions`` alone.

    python example.py                      # a minute or two on two CPU cores; writes example.png
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from functions.betas import BETAS
from functions.denoiser import Denoiser
from functions.denoising import generalized_steps
from functions.losses import sequence_aware_loss
from functions.rng import SeededNoise
from functions.schedule import DiscreteSchedule
from functions.timesteps import antithetic_times, sampling_times
from models.unet import sinusoidal_embedding
from utils.png import save_png, tile

STEPS, BATCH, K, LAMDA, GAMMA, WIDTH = 1500, 64, 2, 1.0, 0.1, 32


class Network(nn.Module):
    """eps(x, t): residual convolutions that are told the time. x (B, 1, 8, 8), t (B,) -> (B, 1, 8, 8)."""

    def __init__(self, width: int, blocks: int = 4):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.first, self.last = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(blocks))

    def forward(self, x, t):
        h, embedding = self.first(x), self.embed(sinusoidal_embedding(t, WIDTH))[:, :, None, None]
        for block in self.blocks:
            h = h + block(h + embedding)                                    # (B, width, 8, 8)
        return self.last(h)


def train(images: torch.Tensor, steps: int = STEPS) -> Denoiser:
    """The denoiser of images in [-1, 1], (N, 1, 8, 8)."""
    denoiser = Denoiser(network := Network(WIDTH), DiscreteSchedule(BETAS["linear"](1e-4, 0.02, 1000)))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x0 = images[torch.randint(len(images), (BATCH,))]                   # (B, 1, 8, 8)
        t = antithetic_times(denoiser.schedule, BATCH)                      # (B,)
        noise, xi = torch.randn(2, K, *x0.shape)                            # (K, B, 1, 8, 8) each
        terms = sequence_aware_loss(denoiser, x0, t, noise, num_consecutive_steps=K, lamda=LAMDA,
                                    input_perturbation=GAMMA, perturbation_noise=xi)
        optimizer.zero_grad()
        terms.total.mean().backward()
        optimizer.step()
        rates.step()
        if step % 200 == 0:
            print(f"step {step:4}  base {terms.base.mean():6.2f}  sequence {terms.sequence.mean():6.2f}")
    return denoiser


def main(steps: int = STEPS, target: str = "example.png") -> None:
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1         # (1797, 1, 8, 8)
    denoiser = train(images, steps)
    noise, times = SeededNoise(range(64)), sampling_times(denoiser.schedule, 50)
    x = generalized_steps(denoiser, noise.randn((64, 1, 8, 8)), times, eta=1.0,
                          noise_fn=lambda index: noise.randn((64, 1, 8, 8)))
    save_png(tile(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)), Path(target))
    print(target)


if __name__ == "__main__":
    main()
