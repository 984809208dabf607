"""A data set as a configuration asks for it: one split of a reader's images, transformed to the image size."""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property

import numpy as np

from datasets.images import transform
from datasets.labels import no_labels
from datasets.reader import Reader
from utils.errors import DataError

SPLIT_SEED = 2019           # DDIM's, for FFHQ
VERSION = 2                 # of what is done to an image; 2: turned as its EXIF says


class Subset(Reader):
    """Some images of a reader; ``choose(number of images) -> indices`` is called when first needed."""

    def __init__(self, reader: Reader, choose: Callable[[int], np.ndarray]):
        self.reader, self.choose, self.parallel = reader, choose, reader.parallel

    @cached_property
    def indices(self) -> np.ndarray:
        return self.choose(len(self.reader))

    @cached_property
    def labels(self) -> np.ndarray:
        return self.reader.labels[self.indices]

    @property
    def captions(self) -> list[str] | None:
        captions = self.reader.captions
        return captions and [captions[int(i)] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, i: int) -> str:
        return self.reader.name(int(self.indices[i]))

    def read(self, i: int) -> np.ndarray:
        return self.reader.read(int(self.indices[i]))

    def stamp(self) -> str:
        return self.reader.stamp()

    def contents(self) -> str:
        return f"none of {len(self.reader)} images chosen" if len(self.reader) else self.reader.contents()


def held_out(fraction: float, split: str, num_images: int) -> np.ndarray:
    """Indices of a split, ascending: DDIM's shuffle with seed 2019, whose last part is ``test``."""
    shuffled = np.random.RandomState(SPLIT_SEED).permutation(num_images)
    num_train = int(num_images * (1 - fraction))
    return np.sort(shuffled[:num_train] if split == "train" else shuffled[num_train:])


def limited(max_size: int, num_images: int, seed: int = 0) -> np.ndarray:
    """Indices of at most ``max_size`` images, ascending: EDM's, the first of a shuffle with its seed 0."""
    indices = np.arange(num_images)
    if num_images > max_size:
        np.random.RandomState(seed).shuffle(indices)
    return np.sort(indices[:max_size])


class ImageDataset:
    """The images of a reader with their transform.

    Args:
        name: For file names and messages, e.g. ``cifar10`` or ``cifar10-test``.
        reader: The images as they lie on disk.
        how: Name in ``datasets.images.TRANSFORMS``.
        shape: (C, H, W) of the result.
        selection: What else decided about images and labels (split, fraction, category); part of the fingerprint.
        labelled: False: as if there were no labels.
    """

    def __init__(self, name: str, reader: Reader, how: str, shape: tuple[int, int, int], selection: tuple = (),
                 labelled: bool = True):
        self.name, self.reader, self.how, self.shape = name, reader, how, shape
        self.selection, self.labelled = selection, labelled

    def __len__(self) -> int:
        if not len(self.reader):
            raise DataError(f"{self.name}: holds no images: {self.reader.contents()}")
        return len(self.reader)

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 (N,), -1: none; or float32 (N, D), vectors."""
        return self.reader.labels if self.labelled else no_labels(len(self.reader))

    @property
    def description(self) -> str:
        return f"{type(self.reader).__name__}, {self.how} to {self.shape[1]}x{self.shape[2]}"

    @cached_property
    def identity(self) -> str:
        """What was asked for, whatever state the files are in."""
        return json.dumps([VERSION, self.name, self.how, "bilinear", self.shape, self.labelled, self.selection])

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over names, sizes and times of the reader's files, transform and image size."""
        return hashlib.sha256(f"{self.identity}{self.reader.stamp()}".encode(errors="surrogateescape")).hexdigest()[:16]

    def read(self, i: int) -> np.ndarray:
        """uint8, (H, W, C), contiguous. Raises DataError naming the image."""
        pixels = self.reader.read(i)
        if pixels.shape[-1] != self.shape[0]:
            raise DataError(f"{self.reader.name(i)}: {pixels.shape[-1]} channel(s), data.channels is {self.shape[0]}")
        return np.ascontiguousarray(transform(pixels, self.shape[1:], self.how, self.reader.name(i)))
