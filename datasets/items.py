"""Images decoded one by one, for PyTorch's DataLoader."""

from functools import cached_property
from itertools import islice

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.image_dataset import ImageDataset
from datasets.images import UnreadableImage
from datasets.labels import class_labels


class DecodedImages(Dataset):
    """Items ``(uint8 tensor (C, H, W), int label)``, label -1 where there is none or it is a vector."""

    def __init__(self, images: ImageDataset):
        self.images = images

    @cached_property
    def labels(self) -> np.ndarray:
        return class_labels(self.images.labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        return torch.tensor(self.images.read(i)).permute(2, 0, 1), int(self.labels[i])


class DecodedBatches(Dataset):
    """Items are whole batches, for ``data.cache: off``: index ``(B,) -> (uint8 (B, H, W, C), unreadable images)``.

    An unreadable image is replaced by the next readable one of its class and reported, so that the caller can count.

    Args:
        labels: int64 (N,), read once, not by every worker.
    """

    def __init__(self, images: ImageDataset, labels: np.ndarray):
        self.images, self.labels = images, labels

    def __getitem__(self, indices: torch.Tensor) -> tuple[torch.Tensor, list[tuple[int, str]]]:
        bad = []
        rows = [self._read(i, bad) for i in indices.tolist()]
        return torch.from_numpy(np.stack(rows)), bad

    def _read(self, i: int, bad: list):
        alike = (j % len(self.images) for j in range(i, i + len(self.images))
                 if self.labels[j % len(self.images)] == self.labels[i])
        for candidate in islice(alike, 100):
            try:
                return self.images.read(candidate)
            except UnreadableImage as error:
                bad.append((candidate, str(error)))
        raise UnreadableImage(bad[-1][1])
