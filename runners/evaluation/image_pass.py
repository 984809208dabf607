"""One pass over images, shared by the ranks: decode in threads while the network works, keep features on request."""

import hashlib
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from configs.schema import Config
from datasets.arrays import npz_array, npz_keys
from datasets.files import ImageFiles
from datasets.image_dataset import limited
from datasets.images import image_size
from datasets.specs import open_any
from runners.distributed import on_rank_zero, rank, world_size
from runners.evaluation.collector import SPACES
from runners.evaluation.references import config_provenance
from utils.atomic import atomic_write
from utils.errors import DataError, UserError, choose

log = logging.getLogger(__name__)
WORKERS = min(16, os.cpu_count() or 1)                       # threads: PIL decodes without the interpreter's lock


class ImageSource(Protocol):
    """Images by index, all of one size."""

    name: str
    provenance: dict                                          # what a reference made of it says about itself

    def __len__(self) -> int: ...

    def check(self) -> None: ...                              # DataError early, before the network has worked

    def batches(self, index_lists: Iterable[Sequence[int]]) -> Iterator[Tensor]: ...      # uint8 (B, C, H, W)


class FileSource:
    """A folder of images, a zip archive of them, or an npz or npy array (N, H, W, C) uint8.

    Raises:
        UserError: No such path, or of no known kind.
        DataError: No images in it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"{self.path}: no such folder or file of images")
        self.reader = self._open()
        self.name = self.path.name
        if not len(self.reader):
            raise DataError(f"{self.path}: holds no images")

    def _open(self):
        """RGB, except that an array of grey images stays grey, which the network takes too."""
        grey, rgb = (open_any(self.path, channels) for channels in (1, 3))
        if isinstance(rgb, ImageFiles):
            return rgb
        try:
            len(rgb)
        except DataError:
            with suppress(DataError):
                len(grey)
                return grey
        return rgb

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def provenance(self) -> dict:
        height, width = self._size(0)
        return {"images": self.name, "image_size": [height, width]}

    def check(self) -> None:
        """Every image can be opened and has the size of the first; pixels are decoded later."""
        if not isinstance(self.reader, ImageFiles):
            return                                            # one array
        first = self._size(0)
        with ThreadPoolExecutor(WORKERS) as pool:
            for i, size in enumerate(pool.map(self._size, range(len(self)), chunksize=64)):
                if size != first:
                    raise DataError(f"{self.reader.name(i)}: {size[0]}x{size[1]}, but {self.reader.name(0)} is "
                                    f"{first[0]}x{first[1]}; the images of one FID must have one size")

    def _size(self, i: int) -> tuple[int, int]:
        if not isinstance(self.reader, ImageFiles):
            return self.reader.read(i).shape[:2]
        return image_size(self.reader.container.read(self.reader.names[i]), self.reader.name(i))

    def batches(self, index_lists: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        with ThreadPoolExecutor(WORKERS) as pool:
            waiting = deque()
            for indices in index_lists:
                waiting.append([pool.submit(self.reader.read, int(i)) for i in indices])
                if len(waiting) > 2:
                    yield _stack(waiting.popleft())
            while waiting:
                yield _stack(waiting.popleft())

    def fingerprint(self) -> str:
        """Changes with the name, size or time of any file."""
        return self.reader.stamp()


def _stack(futures) -> Tensor:
    pixels = [future.result() for future in futures]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)          # (B, H, W, C) -> (B, C, H, W)


class DatasetSource:
    """The training images of a configuration, transformed as for training, unflipped."""

    def __init__(self, config: Config, root: str | Path | None = None):
        from datasets.packed import open_images

        self.store = open_images(config, root=root)
        self.name = config.data.dataset
        self.provenance = {**config_provenance(config), "data_fingerprint": self.store.fingerprint}

    def __len__(self) -> int:
        return self.store.num_images

    def check(self) -> None:
        """Opening it has checked it."""

    def batches(self, index_lists: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        return self.store.batches(torch.as_tensor(indices) for indices in index_lists)


def choose_subset(total: int, num: int | None, seed: int, name: str, rule: str = "default") -> np.ndarray:
    """Indices, ascending: all, or ``num`` distinct ones drawn with ``seed``.

    Args:
        rule: Key of ``SUBSET_RULES``: "edm" draws what EDM's fid.py and its ``max_size`` draw for this seed.

    Raises:
        UserError: There are fewer.
    """
    draw = choose(SUBSET_RULES, rule, "--subset_rule")
    if num is None:
        return np.arange(total)
    if num > total:
        raise UserError(f"--num {num} images asked for, but {name} has {total}")
    return np.sort(draw(total, num, seed))


SUBSET_RULES = {"default": lambda total, num, seed: np.random.default_rng(seed).choice(total, num, replace=False),
                "edm": lambda total, num, seed: limited(num, total, seed % 2**31)}


def evaluate_images(images, evaluation, batch_size: int = 64, *, indices: Sequence[int] | None = None,
                    cache: str | Path | None = None) -> None:
    """Feed images to an ``Evaluation`` or ``Collector``; batches are dealt to the ranks in turn. Collective.

    Args:
        images: An ``ImageSource``, or the path of a folder, zip or npz.
        indices: Which images; None: all.
        cache: File of features that is used if it fits these images, this network and the metrics. Where it does not,
            all features are kept, and ``save_features`` writes them.

    Raises:
        DataError: An unreadable image, or images of several sizes.
    """
    source = FileSource(images) if isinstance(images, (str, Path)) else images
    indices = np.arange(len(source)) if indices is None else np.asarray(indices)
    collector = getattr(evaluation, "collector", evaluation)
    mine = slice(rank(), None, world_size())
    cached = on_rank_zero(lambda: _read_cache(cache, source, collector, indices)) if cache else None
    if cached is not None:
        log.info("features of %d images are taken from %s", len(indices), cache)
        collector.add({space: torch.from_numpy(values[mine]) for space, values in cached.items()}, indices[mine])
        collector.image_size = source.provenance["image_size"]
        return
    on_rank_zero(source.check)
    collector.keep_features = collector.keep_features or bool(cache)
    batches = [indices[start:start + batch_size] for start in range(0, len(indices), batch_size)][mine]
    for chosen, pixels in _progress(zip(batches, source.batches(batches), strict=True), len(indices), source.name):
        collector.update(pixels, chosen)


def save_features(path: str | Path, images: FileSource, evaluation) -> None:
    """Write the features that ``evaluate_images`` has kept, unless they come from there. Collective.

    Raises:
        OSError: No room, or no right to write there.
    """
    collector = getattr(evaluation, "collector", evaluation)
    measured, indices = collector.gather()

    def write():
        if _read_cache(path, images, collector, indices) is None:
            arrays = {space: each.features for space, each in measured.items()}
            key = np.array(_cache_key(images, collector))
            atomic_write(path, lambda file: np.savez(file, key=key, indices=indices, **arrays))

    on_rank_zero(write)


def is_cache(path: Path) -> bool:
    """Whether a file was written by ``save_features``."""
    try:
        keys = {*npz_keys(path)}
        return {"key", "indices"} <= keys and not keys.isdisjoint(SPACES)
    except DataError:
        return False


def _progress(pairs, total: int, name: str):
    from tqdm import tqdm

    with tqdm(total=total, desc=name, unit=" images", disable=rank() > 0, leave=False) as bar:
        for chosen, pixels in pairs:
            yield chosen, pixels
            bar.update(min(len(chosen) * world_size(), total - bar.n))


def _cache_key(source, collector) -> str:
    net = collector.net
    return hashlib.sha256(f"{source.fingerprint()} {net.fingerprint} {net.preprocess}".encode()).hexdigest()


def _read_cache(path, source, collector, indices: np.ndarray) -> dict[str, np.ndarray] | None:
    """Features of ``indices`` by space, or None: absent, of other images or another network, or without a space."""
    if not Path(path).is_file() or not is_cache(Path(path)):
        return None
    try:
        key, stored = str(npz_array(path, "key")), npz_array(path, "indices")
        if key != _cache_key(source, collector) or not np.isin(indices, stored).all() \
                or not {*collector.spaces} <= {*npz_keys(path)}:
            return None
        rows = np.searchsorted(stored, indices)
        return {space: npz_array(path, space)[rows] for space in collector.spaces}
    except (DataError, IndexError, TypeError, ValueError) as error:
        log.warning("%s is no usable cache of features and is made again: %s", path, error)
        return None
