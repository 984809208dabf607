"""What every reader offers, and a data set as a configuration asks for it: one split, transformed to the image size."""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import numpy as np

from datasets.images import transform
from utils.errors import DataError

SPLIT_SEED = 2019           # DDIM's, for FFHQ


class Source(Protocol):
    """Images in a file format. Nothing is opened before it is needed; pickling carries no handle."""

    parallel: bool                                         # whether worker processes make reading faster
    labels: np.ndarray                                     # int64, (N,); -1: none

    def __len__(self) -> int: ...

    def name(self, i: int) -> str: ...                     # for messages

    def read(self, i: int) -> np.ndarray: ...              # uint8 (H, W, C); DataError naming the image

    def stamp(self) -> str: ...                            # changes with names, sizes and times; reads no image


class Subset:
    """Some images of a source; ``choose(number of images) -> indices`` is called when first needed."""

    def __init__(self, source: Source, choose: Callable[[int], np.ndarray]):
        self.source, self.choose, self.parallel = source, choose, source.parallel

    @cached_property
    def indices(self) -> np.ndarray:
        return self.choose(len(self.source))

    @cached_property
    def labels(self) -> np.ndarray:
        return self.source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, i: int) -> str:
        return self.source.name(int(self.indices[i]))

    def read(self, i: int) -> np.ndarray:
        return self.source.read(int(self.indices[i]))

    def stamp(self) -> str:
        return self.source.stamp()


def held_out(fraction: float, split: str, num_images: int) -> np.ndarray:
    """Indices of a split, ascending: DDIM's shuffle with seed 2019, whose last part is ``test``."""
    shuffled = np.random.RandomState(SPLIT_SEED).permutation(num_images)
    num_train = int(num_images * (1 - fraction))
    return np.sort(shuffled[:num_train] if split == "train" else shuffled[num_train:])


class Images:
    """A source with its transform.

    Args:
        name: For file names and messages, e.g. ``cifar10`` or ``cifar10-test``.
        source: The images as they lie on disk.
        how: Name in ``datasets.images.TRANSFORMS``.
        shape: (C, H, W) of the result.
        selection: What else decided about the images (split, fraction, category); part of the fingerprint.
    """

    def __init__(self, name: str, source: Source, how: str, shape: tuple[int, int, int], selection: tuple = ()):
        self.name, self.source, self.how, self.shape, self.selection = name, source, how, shape, selection

    def __len__(self) -> int:
        if not len(self.source):
            raise DataError(f"{self.name}: holds no images ({self.description})")
        return len(self.source)

    @property
    def labels(self) -> np.ndarray:
        return self.source.labels

    @property
    def description(self) -> str:
        return f"{type(self.source).__name__}, {self.how} to {self.shape[1]}x{self.shape[2]}"

    @cached_property
    def identity(self) -> str:
        """What was asked for, whatever state the files are in."""
        return json.dumps([1, self.name, self.how, "bilinear", self.shape, self.selection])

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over source, names, sizes and times of its files, transform and image size."""
        return hashlib.sha256(f"{self.identity}{self.source.stamp()}".encode()).hexdigest()[:16]

    def read(self, i: int) -> np.ndarray:
        """uint8, (H, W, C). Raises DataError naming the image."""
        pixels = self.source.read(i)
        if pixels.shape[-1] != self.shape[0]:
            raise DataError(f"{self.source.name(i)}: {pixels.shape[-1]} channel(s), data.channels is {self.shape[0]}")
        return transform(pixels, self.shape[1:], self.how, self.source.name(i))
