"""Training images as whole batches: gathered by index from a pack, without any per-image Python.

    store = open_images(config)
    for batch in store.batches(index_lists):               # uint8 (B, C, H, W) on the device, channels_last in memory
"""

import atexit
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datasets import DATASETS, DEFAULT_ROOT, open_dataset
from datasets.items import DecodedBatches
from datasets.labels import class_labels, no_labels
from datasets.packing import TooLarge, check_bad, open_pack
from utils.errors import DataError
from utils.processes import kill_workers, leave_signals_to_the_trainer

log = logging.getLogger(__name__)
GPU_SHARE = 4               # auto puts a pack into GPU memory if it takes no more than a quarter of what is free
UPLOAD_BYTES = 1 << 28


class ImageStore(ABC):
    """Images that can be asked for by index. ``batches`` is lazy: an endless ``index_lists`` is fine.

    Args:
        name: Data set and split, for messages.
        fingerprint: Of files, transform and image size.
        labels: int64 (N,), -1 where there is none.
        device: Where batches go.
    """

    def __init__(self, name: str, fingerprint: str, labels: np.ndarray, device: torch.device):
        self.name, self.fingerprint, self.labels, self.device = name, fingerprint, labels, device

    @property
    def num_images(self) -> int:
        return len(self.labels)

    @abstractmethod
    def batches(self, index_lists: Iterable[Tensor]) -> Iterator[Tensor]:
        """long (B,) -> uint8 (B, C, H, W) on the device, in the order given."""


class ResidentStore(ImageStore):
    """The whole array in the memory of the device that trains: ``device``, and ``ram`` on a CPU."""

    def __init__(self, array: np.ndarray, **about):
        super().__init__(**about)
        self.images = torch.empty(array.shape, dtype=torch.uint8, device=self.device)        # (N, H, W, C)
        rows = max(1, UPLOAD_BYTES // max(1, array[0].nbytes))
        for start in range(0, len(array), rows):                                             # not all twice in RAM
            self.images[start:start + rows] = torch.tensor(array[start:start + rows])

    def batches(self, index_lists):
        for indices in index_lists:
            yield self.images.index_select(0, to_device(indices, self.device)).permute(0, 3, 1, 2)


class HostStore(ImageStore):
    """The array on the host, in RAM or memory-mapped; for a GPU the next batch is gathered and pinned meanwhile."""

    def __init__(self, array: np.ndarray, **about):
        super().__init__(**about)
        self.array = array                                                                   # (N, H, W, C)

    def gather(self, indices: Tensor) -> Tensor:
        """long (B,) -> uint8 (B, H, W, C) on the host, pinned for a GPU."""
        rows = indices.numpy()
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self.array):
            raise IndexError(f"{self.name}: image indices must be in [0, {len(self.array)})")
        pinned = self.device.type == "cuda"
        batch = torch.empty((len(rows), *self.array.shape[1:]), dtype=torch.uint8, pin_memory=pinned)
        self.array.take(rows, 0, out=batch.numpy(), mode="clip")          # "raise" would copy once more
        return batch                                                      # (B, H, W, C)

    def batches(self, index_lists):
        gathered = map(self.gather, index_lists) if self.device.type == "cpu" else self._gather_ahead(index_lists)
        for batch in gathered:
            yield batch.to(self.device, non_blocking=True).permute(0, 3, 1, 2)

    def _gather_ahead(self, index_lists: Iterable[Tensor]) -> Iterator[Tensor]:
        with ThreadPoolExecutor(1) as background:
            waiting = deque()
            for indices in index_lists:
                waiting.append(background.submit(self.gather, indices))
                if len(waiting) > 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


class DecodingStore(ImageStore):
    """Nothing is kept: worker processes decode each batch when it is needed (``data.cache: off``)."""

    def __init__(self, images, workers: int, skip_bad: int, **about):
        super().__init__(**about)
        self.images, self.workers, self.skip_bad, self.bad = images, workers, skip_bad, {}

    def batches(self, index_lists):
        cuda = self.device.type == "cuda"
        atexit.unregister(kill_workers)                                     # once, however often this is called
        atexit.register(kill_workers)
        loader = DataLoader(DecodedBatches(self.images, self.labels), batch_size=None, sampler=index_lists,
                            num_workers=self.workers, worker_init_fn=leave_signals_to_the_trainer, pin_memory=cuda,
                            generator=torch.Generator())                    # its own: the global one stays untouched
        for batch, bad in loader:
            self._note(bad)
            yield batch.to(self.device, non_blocking=True).permute(0, 3, 1, 2)

    def _note(self, bad: list) -> None:
        for i, reason in bad:
            if i not in self.bad:
                self.bad[i] = reason
                log.warning("replaced by the next image: %s", reason)
        check_bad([*self.bad.values()], self.skip_bad)


class RepeatedStore(HostStore):
    """A few images that stand for many."""

    def gather(self, indices):
        return super().gather(indices % len(self.array))


STORES = {"device": ResidentStore, "mmap": HostStore,
          "ram": lambda array, **about: HostStore(np.array(array), **about)}


def open_images(config, root=None, split: str = "train", device="cpu") -> ImageStore:
    """The data set as ``data.cache`` says, packed on first use; ranks and jobs that come meanwhile wait.

    ``auto`` is ``device`` on a GPU with room for it, else ``mmap``; it is ``off`` where packing would take more than a
    quarter of the free disk, or where the pack cannot be written.

    Raises:
        DataError: Missing or bad data, or no space for a pack that was explicitly asked for.
        UserError: As ``datasets.find_dataset``.
    """
    data, device = config.data, torch.device(device)
    images = open_dataset(config, root, split)
    about = {"name": images.name, "fingerprint": images.fingerprint, "device": device}
    if data.cache != "off":
        try:
            pack = open_pack(images, packs_folder(root), data.num_workers, data.skip_bad)
            cache = choose_cache(pack.array.nbytes, device) if data.cache == "auto" else data.cache
            log.info("%s: %d images, data.cache %s", images.name, len(pack.array), cache)
            return STORES[cache](pack.array, labels=pack.labels, **about)
        except (TooLarge, OSError) as error:               # OSError: a folder that cannot be written
            if data.cache != "auto":
                raise DataError(str(error)) from None
            log.warning("decoding on the fly (data.cache off): %s", error)
    return DecodingStore(images, data.num_workers, data.skip_bad, labels=_labels(images), **about)


def packs_folder(root=None) -> Path:
    """``.packed`` in the folder that holds data sets."""
    base = Path(root or DEFAULT_ROOT)
    return (base.parent if base.is_file() else base) / ".packed"


def synthetic_images(config, device="cpu") -> ImageStore:
    """64 seeded noise images of the right shape that answer for every index: what a dry run uses without the data.

    ``num_images`` is that of the published data set, and at least one global batch on one process.
    """
    channels, height, width = config.data.shape
    training, spec = config.training, DATASETS.get(config.data.dataset)
    count = max(spec.usual_size(config.data) if spec else 0, training.global_batch_size or training.batch_size)
    images = np.random.RandomState(0).randint(0, 256, (64, height, width, channels), np.uint8)
    return RepeatedStore(images, name="synthetic", fingerprint="synthetic", labels=no_labels(count),
                         device=torch.device(device))


def _labels(images) -> np.ndarray:
    len(images)                                            # an empty data set is reported as such
    return class_labels(images.labels)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; from the host to a GPU without waiting for it, from pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def choose_cache(num_bytes: int, device: torch.device) -> str:
    """What ``data.cache: auto`` means."""
    if device.type == "cuda" and num_bytes <= torch.cuda.mem_get_info(device)[0] // GPU_SHARE:
        return "device"
    return "mmap"
