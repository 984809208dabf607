"""Images decoded one by one, for PyTorch's DataLoader."""

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.images import UnreadableImage
from datasets.source import Images


class DecodedImages(Dataset):
    """Items ``(uint8 tensor (C, H, W), int label)``."""

    def __init__(self, images: Images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        return torch.tensor(self.images.read(i)).permute(2, 0, 1), int(self.images.labels[i])


class DecodedBatches(Dataset):
    """Items are whole batches, for ``data.cache: off``: index ``(B,) -> (uint8 (B, H, W, C), unreadable images)``.

    An unreadable image is replaced by the next readable one and reported, so that the caller can count.
    """

    def __init__(self, images: Images):
        self.images = images

    def __getitem__(self, indices: torch.Tensor) -> tuple[torch.Tensor, list[tuple[int, str]]]:
        bad = []
        rows = [self._read(i, bad) for i in indices.tolist()]
        return torch.from_numpy(np.stack(rows)), bad

    def _read(self, i: int, bad: list):
        for candidate in range(i, i + 100):
            try:
                return self.images.read(candidate % len(self.images))
            except UnreadableImage as error:
                bad.append((candidate % len(self.images), str(error)))
        raise UnreadableImage(bad[-1][1])
