"""What every reader of a file format offers."""

from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np

from datasets.labels import no_labels


class Reader(ABC):
    """Images in a file format. Nothing is opened before it is needed; pickling carries no handle."""

    parallel = True                                        # whether worker processes make reading faster
    captions: list[str] | None = None                      # a text for each image, where the format has them

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 (N,), -1: none; or float32 (N, D)."""
        return no_labels(len(self))

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, i: int) -> str:
        """How image ``i`` is called in messages."""

    @abstractmethod
    def read(self, i: int) -> np.ndarray:
        """Pixels of image ``i``: uint8, (H, W, C). Raises DataError naming it."""

    @abstractmethod
    def stamp(self) -> str:
        """Changes with any file's name, size or modification time; reads no image."""

    @abstractmethod
    def contents(self) -> str:
        """What there is, where no image is; for messages."""
