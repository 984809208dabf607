"""Randomness that can be repeated: a stream for each image when sampling, for each (seed, step, shard) in training."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def parse_seeds(text: str) -> list[int]:
    """``"0-63"`` or ``"1,2,5-10"`` as a list, in the order given.

    Raises:
        ValueError: Not of that form, a range that runs backwards, or a seed given twice.
    """
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise ValueError(f"seeds {text!r}: {part!r} is neither a number nor a range such as 0-63")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"seeds {text!r}: the range {part.strip()} runs backwards")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds {text!r}: a seed is given twice")
    return seeds


class SeededNoise:
    """Standard normal draws with one generator for each image: image s is the same in any batch, on any rank.

    The draws are made on the CPU, so they do not depend on the device: generator s is
    ``torch.Generator().manual_seed(s % 2**32)``, and each call takes one float32 draw from it.

    Args:
        seeds: One for each image.
        device: Where the result goes.
    """

    def __init__(self, seeds: Sequence[int], device="cpu"):
        self.device, self.seeds = device, seeds
        self.generators = [torch.Generator().manual_seed(int(seed) % 2**32) for seed in seeds]

    def randn(self, shape) -> Tensor:
        """(B, ...) float32 with B = len(seeds)."""
        if shape[0] != len(self.generators):
            raise ValueError(f"shape {tuple(shape)} is for {shape[0]} images, given {len(self.generators)} seeds")
        noise = torch.empty(tuple(shape), pin_memory=torch.device(self.device).type == "cuda")
        for row, generator in zip(noise, self.generators, strict=True):
            torch.randn(row.shape, generator=generator, out=row)
        return noise.to(self.device, non_blocking=True)


def slerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Spherical interpolation between two latents of one shape, which keeps their norm (DDIM, appendix D.5)."""
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.acos(cosine.clamp(-1, 1))
    return (torch.sin((1 - alpha) * angle) * a + torch.sin(alpha * angle) * b) / torch.sin(angle)


def derive_seed(*key: int) -> int:
    """A well mixed 63-bit seed for a tuple of non-negative integers (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def shard_generator(seed: int, step: int, shard: int, device="cpu") -> torch.Generator:
    """The stream of one shard of one training step.

    A shard is the part of the global batch that goes through the network in one call. Since its randomness depends
    on nothing else, a run resumes exactly without saved generator states, and does not depend on which process
    computes which shard. Dropout draws from torch's global generator, which is seeded here too.
    """
    torch.manual_seed(derive_seed(seed, step, shard, 1))
    return torch.Generator(device).manual_seed(derive_seed(seed, step, shard, 0))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block, such as the initialisation of weights, from ``seed``; the caller's CPU stream is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed))
        yield
