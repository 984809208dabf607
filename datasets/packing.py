"""Decode a data set once into one uint8 array (N, H, W, C) on disk, whole or not at all, by one process."""

import logging
import math
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.image_dataset import ImageDataset
from datasets.images import UnreadableImage
from datasets.labels import class_labels, is_class, no_labels
from utils.atomic import atomic_path, write_json
from utils.errors import DataError
from utils.files import read_json
from utils.locks import exclusive
from utils.processes import leave_with
from utils.safe_load import map_npy

log = logging.getLogger(__name__)
CHUNK = 256                 # images for each task of a worker
FEW = 1000                  # fewer are decoded in this process: starting workers takes longer
DISK_SHARE = 4              # a pack may take a quarter of the free disk


class TooLarge(DataError):
    """The pack would take more of the disk than it may."""


@dataclass(frozen=True)
class Pack:
    array: np.ndarray       # memory-mapped, read-only, uint8 (N, H, W, C)
    labels: np.ndarray      # int64 (N,), -1: none
    bad: list               # [[name, reason], ...]: images left out


def open_pack(images: ImageDataset, folder: Path, workers: int, skip_bad: int) -> Pack:
    """The pack of ``images`` in ``folder``; made first if there is none of these very files and this transform.

    Args:
        images: What to decode.
        folder: Where packs lie (``exp/datasets/.packed``).
        workers: Processes that decode; 0: this one.
        skip_bad: Number of unreadable images that are left out and listed before packing fails.

    Raises:
        DataError: A bad image, an empty data set, no space.
        TooLarge: More than a quarter of the free disk.
    """
    path = folder / f"{images.name}-{images.fingerprint}.npy"
    found = _load(path, images.shape)
    if found is None:
        lock = folder / f"{images.name.partition('-')[0]}.lock"
        with exclusive(lock, f"packing {images.name}") as descriptor:
            found = _load(path, images.shape) or _build(images, path, workers, skip_bad, descriptor)
    list_bad(found.bad, skip_bad)
    if found.bad:
        log.warning("to try these again, after mending them or installing what reads them, remove %s", path)
    return found


def _load(path: Path, image_shape: tuple[int, int, int]) -> Pack | None:
    """The pack of images of (C, H, W) in ``path``; None if it is absent, or not what ``_build`` writes."""
    about = path.with_suffix(".json")
    if not (path.exists() and about.exists()):
        return None
    try:
        array, (channels, height, width) = map_npy(path), image_shape
        if array.dtype != np.uint8 or array.shape[1:] != (height, width, channels) or not len(array):
            raise ValueError(f"it holds {array.dtype} {array.shape}")
        stored = read_json(about)
        bad = [(str(name), str(reason)) for name, reason in stored["bad"]]
        return Pack(array, _stored_labels(stored["labels"], len(array)), bad)
    except Exception as error:                # whatever a damaged file makes of it
        log.warning("%s: damaged, it is made again: %s", path, error)
        return None


def _stored_labels(labels: list | None, count: int) -> np.ndarray:
    if labels is None:
        return no_labels(count)
    if len(labels) != count:
        raise ValueError(f"{len(labels)} labels for {count} images")
    if not all(map(is_class, labels)):
        raise ValueError("its labels are no classes")
    return np.array(labels, np.int64)


def _build(images: ImageDataset, path: Path, workers: int, skip_bad: int, lock: int) -> Pack:
    for left_over in path.parent.glob(f".{images.name.partition('-')[0]}-*.tmp"):
        left_over.unlink()                                 # of a killed process: we hold the lock
    channels, height, width = images.shape
    shape = len(images), height, width, channels
    size = math.prod(shape)
    log.info("packing %s: %d images of %dx%d into %.1f MB at %s", images.name, *shape[:3], size / 1e6, path.parent)
    check_space(f"packing {images.name}", size, path.parent, "set data.cache off, or free some disk")
    start = time.perf_counter()
    with atomic_path(path) as temporary:
        allocate(temporary, shape)
        bad = _decode_all(images, temporary, workers, skip_bad, lock)
        kept = np.delete(np.arange(len(images)), list(bad))
        _drop_rows(temporary, kept)
        labels = class_labels(images.labels)[kept]
        write_json(path.with_suffix(".json"), {
            "identity": images.identity, "reader": images.description, "count": len(kept),
            "bad": [[images.reader.name(i), reason] for i, reason in sorted(bad.items())],
            "labels": labels.tolist() if (labels >= 0).any() else None})
    log.info("packed %d images of %s in %.1f s", len(kept), images.name, time.perf_counter() - start)
    _remove_stale(images, path)
    return _load(path, images.shape)


def check_space(what: str, size: int, folder: Path, advice: str) -> None:
    """TooLarge if ``size`` bytes of ``what`` are more than a quarter of the free disk; ``advice`` is what to do."""
    free = shutil.disk_usage(folder).free
    if size > free / DISK_SHARE:
        raise TooLarge(f"{what} would take {size / 1e9:.1f} GB, more than a quarter of the "
                       f"{free / 1e9:.1f} GB that are free in {folder}; {advice}")


def allocate(path: Path, shape: tuple[int, ...], dtype=np.uint8) -> None:
    """An npy file of zeros. Reserves the disk space, because running out of it in a mapped file kills the process."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": dtype.str})
        file.flush()
        try:
            os.posix_fallocate(file.fileno(), 0, file.tell() + size)
        except OSError as error:
            raise DataError(f"{path.parent}: no room for a pack of {size / 1e6:.1f} MB: {error.strerror}") from None


def _decode_all(images: ImageDataset, path: Path, workers: int, skip_bad: int, lock: int) -> dict[int, str]:
    """Fill the array in ``path``. Returns {index: reason} of unreadable images, at most ``skip_bad``."""
    chunks = [(i, min(i + CHUNK, len(images))) for i in range(0, len(images), CHUNK)]
    bad = {}
    with tqdm(total=len(images), desc=f"packing {images.name}", unit="img", disable=None) as progress:
        for done, unreadable in _results(images, path, chunks, workers, lock):
            bad |= unreadable
            progress.update(done)
            check_bad([bad[i] for i in sorted(bad)], skip_bad)
    return bad


def _results(images: ImageDataset, path: Path, chunks: list, workers: int, lock: int):
    """Yield what ``_decode`` returns for each chunk, in any order."""
    if not (workers and images.reader.parallel and len(images) >= FEW):
        array = np.lib.format.open_memmap(path, "r+")
        yield from (_decode(images, array, *chunk) for chunk in chunks)
        return
    fork = multiprocessing.get_context("fork")             # inherits the listing of the reader
    pool = ProcessPoolExecutor(workers, fork, _start_worker, (images, path, lock, os.getpid()))
    try:
        for future in as_completed([pool.submit(_work, *chunk) for chunk in chunks]):
            yield future.result()
    except BrokenProcessPool:
        raise DataError(f"packing {images.name}: a worker process was killed (out of memory?); "
                        "lower data.num_workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_job = None                 # in a worker: (images, array)


def _work(start: int, stop: int):
    return _decode(*_job, start, stop)


def _start_worker(images: ImageDataset, path: Path, lock: int, parent: int) -> None:
    """Leave signals to the parent; neither outlive it nor hold its lock."""
    global _job
    os.close(lock)
    _job = images, np.lib.format.open_memmap(path, "r+")
    leave_with(parent)


def _decode(images: ImageDataset, array: np.ndarray, start: int, stop: int) -> tuple[int, dict[int, str]]:
    """Decode images [start, stop) into their rows. Returns how many, and {index: reason} of the unreadable ones."""
    bad = {}
    for i in range(start, stop):
        try:
            array[i] = images.read(i)
        except UnreadableImage as error:
            bad[i] = str(error)
    return stop - start, bad


def check_bad(reasons: list[str], skip_bad: int) -> None:
    """DataError with the first of the reasons why images are left out, if there are more than ``skip_bad``."""
    if len(reasons) > skip_bad:
        allowed = f"data.skip_bad allows {skip_bad}" if skip_bad else "set data.skip_bad to tolerate some"
        raise DataError(f"{reasons[0]} ({len(reasons)} unreadable so far; {allowed})")


def list_bad(bad: list, skip_bad: int) -> None:
    """As ``check_bad``, of [[name, reason], ...]; and tells what was left out."""
    reasons = [reason for _, reason in bad]
    check_bad(reasons, skip_bad)
    for reason in reasons:
        log.warning("left out: %s", reason)


def _drop_rows(path: Path, kept: np.ndarray) -> None:
    """Close the gaps of unreadable images: move rows up, then shorten the file."""
    array = np.lib.format.open_memmap(path, "r+")
    shape = (len(kept), *array.shape[1:])
    if len(kept) == len(array):
        return
    if not len(kept):
        raise DataError(f"{path.parent}: every image of the data set is unreadable")
    for to, row in enumerate(kept):
        array[to] = array[row]
    offset = array.offset
    del array
    with open(path, "rb+") as file:                        # numpy pads headers so that the length may change in place
        np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": "|u1"})
        file.truncate(offset + math.prod(shape))


def _remove_stale(images: ImageDataset, path: Path) -> None:
    """Delete packs of the same request whose files have changed since."""
    for about in path.parent.glob(f"{images.name}-*.json"):
        try:
            stale = about.stem != path.stem and read_json(about)["identity"] == images.identity
        except (DataError, OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if stale:
            log.info("removing %s: its files have changed", about.with_suffix(".npy"))
            about.with_suffix(".npy").unlink(missing_ok=True)
            about.unlink(missing_ok=True)
