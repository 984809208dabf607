"""Where generated images go: PNG files, one npz, or nowhere but into the metrics.

A writer is told of batches by the position of their first image in the whole list, and knows which are there already.
"""

import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.arrays import npz_array
from datasets.images import BYTE_LIMIT, decode
from runners import distributed
from runners.sampling.folder import ImageFolder
from utils.atomic import atomic_path, atomic_write
from utils.errors import DataError
from utils.files import read_regular
from utils.png import save_png
from utils.safe_load import map_npy


class PngWriter:
    """Encodes on threads while the network works; a batch that is wholly there already is not made again."""

    def __init__(self, folder: ImageFolder, shape: tuple[int, int, int]):
        self.folder, self.shape, self.pool, self.pending = folder, shape, ThreadPoolExecutor(2), []

    def has(self, start: int, seeds: list[int]) -> bool:
        return all(self.folder.image(seed).exists() for seed in seeds)

    def write(self, start: int, seeds: list[int], images: Tensor) -> None:
        self.finish()                                          # at most one batch waits; errors surface here
        missing = [(seed, image) for seed, image in zip(seeds, images, strict=True)
                   if not self.folder.image(seed).exists()]
        self.pending = [self.pool.submit(save_png, image, self.folder.image(seed), False) for seed, image in missing]

    def read(self, start: int, seeds: list[int]) -> Tensor:
        arrays = [self._decode(self.folder.image(seed)) for seed in seeds]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)

    def _decode(self, path: Path) -> np.ndarray:
        try:
            pixels = decode(read_regular(path, BYTE_LIMIT, "picture"), str(path), self.shape[0], strict=True)
        except DataError as error:
            raise DataError(f"{error}; remove it, and it will be made again") from None
        if pixels.shape[:2] != self.shape[1:]:
            raise DataError(f"{path}: {pixels.shape[0]}x{pixels.shape[1]} pixels, not {self.shape[1]}x{self.shape[2]}; "
                            "remove it, and it will be made again")
        return pixels

    def finish(self) -> None:
        for future in self.pending:
            future.result()
        self.pending = []

    def close(self) -> None:
        self.finish()
        self.pool.shutdown()


class NpzWriter:
    """Rows of a memory-mapped array, which rank 0 wraps into ``samples_NxHxWxC.npz``: arr_0, and labels in arr_1, as
    ADM has them."""

    def __init__(self, folder: Path, count: int, shape: tuple[int, int, int], labels: np.ndarray | None = None):
        c, h, w = shape
        self.labels = labels                                   # int64 (count,)
        self.target = folder / f"samples_{count}x{h}x{w}x{c}.npz"
        self.rows, self.flags = folder / f".{self.target.stem}.npy", folder / f".{self.target.stem}.done.npy"
        self.finished = distributed.on_rank_zero(lambda: self._prepare((count, h, w, c)))
        if self.finished:
            self.array = self._checked(self.target, npz_array(self.target, "arr_0"), (count, h, w, c))
            return
        self._checked(self.rows, map_npy(self.rows), (count, h, w, c))
        self._checked(self.flags, map_npy(self.flags), (count,))
        self.array, self.done = (np.load(path, mmap_mode="r+") for path in (self.rows, self.flags))

    @staticmethod
    def _checked(path: Path, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if array.shape != shape or array.dtype != np.uint8:
            raise DataError(f"{path}: {array.dtype} {array.shape}, not uint8 {shape}; remove it, and it will be made "
                            "again")
        return array

    def _prepare(self, shape: tuple[int, ...]) -> bool:
        """Whether the file is there already; else the rows are allocated, for a full disk would kill whoever maps them.

        Raises:
            DataError: No room for them.
        """
        if self.target.exists():
            self._remove_rows()                                # of a process killed just after it had made the target
        elif not self.flags.exists():
            try:
                np.lib.format.open_memmap(self.rows, "w+", np.uint8, shape).flush()
                with open(self.rows, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            except OSError as error:
                size = np.prod(shape) / 2**20
                self.rows.unlink(missing_ok=True)
                raise DataError(f"--save npz needs {size:,.1f} MiB in {self.target.parent} and as much again for the "
                                f"archive: {error.strerror}") from None
            atomic_write(self.flags, lambda file: np.save(file, np.zeros(shape[0], np.uint8)))
        return self.target.exists()

    def _remove_rows(self) -> None:
        self.flags.unlink(missing_ok=True)                     # first: rows without flags are made anew
        self.rows.unlink(missing_ok=True)

    def has(self, start: int, seeds: list[int]) -> bool:
        return self.finished or bool(self.done[start:start + len(seeds)].all())

    def write(self, start: int, seeds: list[int], images: Tensor) -> None:
        self.array[start:start + len(seeds)] = images.permute(0, 2, 3, 1).cpu().numpy()
        self.done[start:start + len(seeds)] = 1

    def read(self, start: int, seeds: list[int]) -> Tensor:
        return torch.from_numpy(np.array(self.array[start:start + len(seeds)])).permute(0, 3, 1, 2)

    def close(self) -> None:
        if self.finished:
            return
        self.array.flush()
        distributed.barrier()
        if distributed.rank() == 0:
            with atomic_path(self.target) as temporary, zipfile.ZipFile(temporary, "w") as file:
                file.write(self.rows, "arr_0.npy")
                if self.labels is not None:
                    with file.open("arr_1.npy", "w") as entry:
                        np.lib.format.write_array(entry, self.labels)
            self._remove_rows()


class NoWriter:
    """Images go to the metrics only."""

    def has(self, start: int, seeds: list[int]) -> bool:
        return False

    def write(self, start: int, seeds: list[int], images: Tensor) -> None:
        pass

    def close(self) -> None:
        pass


def open_writer(name: str, folder: ImageFolder, count: int, shape: tuple[int, int, int], labels: Tensor | None = None):
    """The writer of ``--save NAME`` for so many images (C, H, W); ``labels`` (count,) go into an npz, unless -1."""
    known = labels is not None and bool((labels >= 0).all())
    makers = {"png": lambda: PngWriter(folder, shape),
              "npz": lambda: NpzWriter(folder.path, count, shape, labels.cpu().numpy() if known else None),
              "none": NoWriter}
    return makers[name]()
