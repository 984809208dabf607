"""Randomness that can be repeated: a stream for each image when sampling, for each (seed, step, shard) in training."""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain, pairwise
from operator import eq, index

import numpy as np
import torch
from torch import Tensor

LAST_SEED = 2**32 - 1                        # seeds count modulo 2^32: a larger one would repeat another image


class Seeds(Sequence):
    """Seeds in the order given, as ranges: a billion takes no more memory than one.

    Args:
        ranges: Disjoint, each ascending by one, none empty.
    """

    def __init__(self, ranges: Iterable[range]):
        self.ranges = tuple(ranges)
        self.starts = [0, *accumulate(map(len, self.ranges))]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self._slice(*index.indices(len(self)))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place = bisect_right(self.starts, index % len(self)) - 1
        return self.ranges[place][index % len(self) - self.starts[place]]

    def _slice(self, start: int, stop: int, step: int) -> "Seeds | list[int]":
        if step != 1:
            return [self[i] for i in range(start, stop, step)]
        parts = (part[max(start - first, 0):max(stop - first, 0)]
                 for part, first in zip(self.ranges, self.starts, strict=False))
        return Seeds(part for part in parts if len(part))

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(self.ranges)

    def __contains__(self, seed) -> bool:
        return any(seed in part for part in self.ranges)

    def __eq__(self, other) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    def __str__(self) -> str:
        """``0-63,70``: what ``parse_seeds`` reads."""
        return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in self.ranges)

    def __repr__(self) -> str:
        return f"Seeds({self})"


def parse_seeds(text: str) -> Seeds:
    """``"0-63"`` or ``"1,2,5-10"`` in the order given; nothing is listed, however many there are.

    Raises:
        ValueError: Not of that form, a range that runs backwards, a seed given twice or above 2^32 - 1.
    """
    ranges, shown = [], text if len(text) < 80 else f"{text[:77]}..."
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part, re.ASCII)
        if not match:
            raise ValueError(f"seeds {shown!r}: {part[:40]!r} is neither a number nor a range such as 0-63")
        ends = [end.lstrip("0") or "0" for end in match.groups() if end]
        if any(len(end) > 10 or int(end) > LAST_SEED for end in ends):
            raise ValueError(f"seeds {shown!r}: {part.strip()[:40]} goes beyond the last seed, {LAST_SEED}")
        first, last = int(ends[0]), int(ends[-1])
        if last < first:
            raise ValueError(f"seeds {shown!r}: the range {part.strip()} runs backwards")
        ranges.append(range(first, last + 1))
    ascending = sorted(ranges, key=lambda part: part.start)
    if twice := [b.start for a, b in pairwise(ascending) if b.start < a.stop]:
        raise ValueError(f"seeds {shown!r}: {twice[0]} is given twice")
    return Seeds(_joined(ranges))


def check_seeds(seeds: Sequence[int], last: int = LAST_SEED) -> Sequence[int]:
    """``seeds`` as whole numbers of Python; ranges stay ranges.

    Raises:
        ValueError: One is no whole number, negative, above ``last``, or there twice.
    """
    if isinstance(seeds, Seeds):
        ends = [end for part in seeds.ranges for end in (part[0], part[-1])]
    elif isinstance(seeds, range):
        ends = [seeds[0], seeds[-1]] if seeds else []
    else:
        try:
            seeds = ends = [index(seed) for seed in seeds]
        except TypeError:
            raise ValueError(f"seeds {str(seeds)[:80]} must be whole numbers in a list, or a range such as "
                             "range(16)") from None
    if wrong := next((seed for seed in ends if not 0 <= seed <= last), None):
        raise ValueError(f"seed {wrong}: seeds are 0 to {last}")
    if isinstance(seeds, list) and len(set(seeds)) < len(seeds):
        twice = next(seed for seed, times in Counter(seeds).items() if times > 1)
        raise ValueError(f"seed {twice} is given twice")
    return seeds


def _joined(ranges: list[range]) -> list[range]:
    """Neighbours that go on where the one before ends become one."""
    joined = ranges[:1]
    for part in ranges[1:]:
        if part.start == joined[-1].stop:
            joined[-1] = range(joined[-1].start, part.stop)
        else:
            joined.append(part)
    return joined


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
    """A well mixed 63-bit seed for a tuple of non-negative integers (NumPy's SeedSequence, to which zeros at the end
    of a short tuple mean nothing)."""
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
