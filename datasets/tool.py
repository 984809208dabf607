"""What dataset_tool.py does: convert a source into an on-disk format, verify a data set, describe a source."""

import hashlib
import logging
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configs.schema import load_config
from datasets import SPLITS, open_dataset
from datasets.convert import FORMATS, check_free, encode, format_of
from datasets.image_dataset import ImageDataset
from datasets.images import Unfit, UnreadableImage, transform
from datasets.reader import Reader
from datasets.specs import DATASETS, open_any
from utils.errors import DataError, UserError
from utils.processes import leave_with
from utils.text import escape_control
from utils.writable import check_writable

log = logging.getLogger("sa-ddim")
LOOKED_AT = 100                                      # pictures that info opens


# ---------------------------------------------------------------- convert

def convert(args) -> None:
    """Write the transformed source, whole or not at all."""
    if args.transform != "none" and args.resolution is None:
        raise UserError(f"--transform {args.transform} needs --resolution WxH")
    for flag, value, most in (("--jpeg", args.jpeg, 100), ("--max-images", args.max_images, None)):
        if value is not None and not 1 <= value <= (most or value):
            raise UserError(f"{flag} {value} must be at least 1" + (f" and at most {most}" if most else ""))
    kind = args.format or format_of(args.dest)
    check_free(args.dest, kind)
    check_writable(args.dest, "--dest")
    reader = open_source(args.source, args.skip_bad, args.labels)
    if kind in ("lmdb", "npy") and (reader.labels != -1).any():
        log.warning("%s has no place for labels; they are left out", kind)
    labels = []
    FORMATS[kind](_noting_labels(_items(reader, args), labels), args.dest, ".png" if args.jpeg is None else ".jpg")
    said = "none" if kind in ("lmdb", "npy") else _classes(np.array(labels))
    log.info("wrote %s (%s): %d images, labels: %s", args.dest, kind, len(labels), said)


def _noting_labels(items: Iterator, labels: list) -> Iterator:
    for item in items:
        labels.append(item[2])
        yield item


def open_source(path: Path, skip_bad: int = 0, labels: str = "auto") -> Reader:
    """The images of ``--source`` in their own number of channels: grey if the first readable one is, else RGB."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    for channels in (3, 1):
        reader = open_any(path, channels, strict=True, labels=labels)
        if not len(reader):
            raise DataError(f"--source holds no images: {reader.contents()}")
        try:
            _first_readable(reader, skip_bad)
            break
        except UnreadableImage:
            raise
        except DataError as error:
            problem = error
    else:
        channels = 3                                       # alpha and the like are converted
        _first_readable(open_any(path, 3, labels=labels), skip_bad)
        log.info("converting to RGB: %s", problem)
    # A grey set with a colour image in it is refused.
    return open_any(path, 3, labels=labels) if channels == 3 else reader


def _first_readable(reader: Reader, skip_bad: int) -> np.ndarray:
    for i in range(min(len(reader), skip_bad + 1)):
        try:
            return reader.read(i)
        except UnreadableImage as error:
            if i == min(len(reader) - 1, skip_bad):
                raise UnreadableImage(f"{error} ({i + 1} unreadable so far; --skip_bad allows {skip_bad})") from None
    raise AssertionError("skip_bad is negative")


def _items(reader: Reader, args) -> Iterator[tuple[np.ndarray, bytes, int | list]]:
    """(pixels, file, label) of each image that can be read and fits, in order; checks that all have one size."""
    count = min(len(reader), args.max_images or len(reader))
    size, left_out = None, {Unfit: [], UnreadableImage: []}
    work = partial(_convert_one, reader, args.resolution, args.transform, args.resample, args.jpeg)
    with tqdm(total=count, desc="converting", unit="img", disable=None) as progress:
        for i, outcome in enumerate(_map(work, count, args.workers if reader.parallel else 0)):
            progress.update()
            if isinstance(outcome, DataError):
                left_out[type(outcome)].append(str(outcome))
                _check_skipped(left_out[UnreadableImage], args.skip_bad)
                continue
            size = size or outcome[0].shape
            if outcome[0].shape != size:
                raise DataError(f"{reader.name(i)}: the image is {outcome[0].shape}, those before are {size} "
                                "(height, width, channels); give --resolution WxH")
            yield *outcome, reader.labels[i].tolist()
    if size is None:
        raise DataError(f"{args.source}: no image is left; the first: {sum(left_out.values(), [])[0]}")
    for problem in left_out[UnreadableImage]:
        log.warning("left out: %s", problem)
    if left_out[Unfit]:
        log.warning("left out %d images that do not fit; the first: %s", len(left_out[Unfit]), left_out[Unfit][0])


def _check_skipped(unreadable: list[str], skip_bad: int) -> None:
    if len(unreadable) > skip_bad:
        allowed = f"--skip_bad allows {skip_bad}" if skip_bad else "give --skip_bad N to leave some out"
        raise DataError(f"{unreadable[0]} ({len(unreadable)} unreadable so far; {allowed})")


def _convert_one(reader: Reader, size, how: str, resample: str, jpeg: int | None, i: int):
    """(pixels, file), or why there are none."""
    try:
        pixels = reader.read(i)
        if size is not None:
            pixels = transform(pixels, size, "resize" if how == "none" else how, reader.name(i), resample)
    except (Unfit, UnreadableImage) as error:
        return error
    pixels = np.ascontiguousarray(pixels)
    return pixels, encode(pixels, jpeg)


def _map(work, count: int, workers: int) -> Iterator:
    """Results of ``work(0), work(1), ...`` in order."""
    global _work
    _work = work                                           # forked workers inherit it, with the listing of the reader
    if workers < 2 or count < 500:
        yield from map(work, range(count))
        return
    fork = multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(workers, fork, leave_with, (os.getpid(),)) as pool:
            for start in range(0, count, 8192):            # so that results cannot pile up
                yield from pool.map(_call_work, range(start, min(start + 8192, count)), chunksize=32)
    except BrokenProcessPool:
        raise DataError("converting: a worker process was killed (out of memory?); lower --workers") from None


_work = None


def _call_work(i: int):
    return _work(i)


# ---------------------------------------------------------------- verify, info

def verify(args) -> None:
    """Check what training would read, split by split."""
    if not args.config:
        raise UserError("verify needs --config NAME.yml")
    config = load_config(args.config, args.overrides)
    spec, fraction = DATASETS.get(config.data.dataset), config.data.validation_fraction
    splits = SPLITS if spec is None or spec.official_split or spec.held_out or fraction else ["train"]
    for split in splits:
        try:
            images = open_dataset(config, Path(args.exp) / "datasets", split)
        except DataError as error:
            if split == "train":
                raise
            print(f"{config.data.dataset} {split}: absent ({error})")
            continue
        _verify_split(images, config.data, args.full)


def _verify_split(images: ImageDataset, data, full: bool) -> None:
    last = len(images) - 1
    digest, bad = hashlib.sha256(), []
    for i in tqdm(range(len(images)) if full else sorted({0, last}), desc=images.name, unit="img", disable=None):
        try:
            digest.update(images.read(i))
        except UnreadableImage as error:
            bad.append(str(error))
    for problem in bad[:20]:
        print(f"unreadable: {escape_control(problem)}")
    unreadable = f", {len(bad)} of them unreadable" if bad else ""
    print(f"{images.name}: {len(images)} images{unreadable} ({images.description}, {data.channels} channel(s)), "
          f"labels: {_classes(images.labels)}, fingerprint {images.fingerprint}, "
          f"sha256 of the pixels of {'all' if full else 'first and last'}: {digest.hexdigest()[:16]}")
    if len(bad) > data.skip_bad:
        raise DataError(f"{images.name}: {len(bad)} unreadable images, data.skip_bad allows {data.skip_bad}; "
                        f"the first: {bad[0]}")


def info(args) -> None:
    """Print what a source holds; the first pictures are opened."""
    reader = open_source(args.source, LOOKED_AT - 1)
    looked, shapes, bad = min(len(reader), LOOKED_AT), {}, []
    for i in range(looked):
        try:
            shapes[reader.name(i)] = reader.read(i).shape
        except UnreadableImage as error:
            bad.append(f"unreadable {escape_control(str(error).replace(': unreadable image', ''))}")
    name, (height, width, channels) = next(iter(shapes.items()))
    print(f"source    {escape_control(str(args.source))} ({type(reader).__name__})\n"
          f"images    {len(reader)}, other files {getattr(reader, 'ignored', 0)}\n"
          f"first     {escape_control(name)}: {height}x{width}, {channels} channel(s)\n"
          f"sizes     of the first {looked}: height {_range(h for h, _, _ in shapes.values())}, "
          f"width {_range(w for _, w, _ in shapes.values())}; {len(bad)} unreadable\n"
          f"labels    {_classes(reader.labels)}", *bad, sep="\n")


def _range(numbers: Iterator[int]) -> str:
    numbers = sorted(numbers)
    low, high = numbers[0], numbers[-1]
    return str(low) if low == high else f"{low} to {high}"


def _classes(labels: np.ndarray) -> str:
    if labels.ndim == 2:
        return f"vectors of {labels.shape[1]} numbers"
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    return f"{len(classes)} classes of {counts.min()} to {counts.max()} images" if len(classes) else "none"
