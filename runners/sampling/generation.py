"""Many images from many seeds: dealt to ranks, resumable, streamed into files and metrics."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from functions.pixels import to_uint8
from runners import distributed
from runners.conditioning import PROMPT_STRIDE
from runners.evaluation.metrics import Evaluation
from runners.sampling.sampler import Sampler
from runners.sampling.writers import NoWriter
from utils.png import captioned, save_png, tile

log = logging.getLogger(__name__)


class Generated(NamedTuple):
    results: dict | None             # of the evaluation, the same on every rank
    shown: dict[int, Tensor]         # this rank's images by position, uint8 (C, H, W), as many as were to be kept
    seconds: float                   # of sampling, without the metrics


def generate(sampler: Sampler, seeds: Sequence[int], batch_size: int, writer) -> Iterator[tuple]:
    """Make or find this rank's share of the images.

    Yields:
        (start, seeds, images): position of the batch in the list, its seeds, uint8 (B, C, H, W).
    """
    mine = distributed.deal(seeds, batch_size)
    found = 0
    with tqdm(total=len(seeds), unit="img", desc="sampling", dynamic_ncols=True, disable=distributed.rank() > 0) as bar:
        for start, chunk in mine:
            if writer.has(start, chunk):
                images, found = writer.read(start, chunk), found + len(chunk)
            else:
                images = to_uint8(sampler(chunk)).cpu()
                writer.write(start, chunk, images)
            bar.update(min(len(chunk) * distributed.world_size(), bar.total - bar.n))
            yield start, chunk, images
    writer.close()
    if found:
        log.info("%d images of rank 0's share were there already", found)


def generate_and_measure(sampler: Sampler, seeds: Sequence[int], batch_size: int, *, writer=None,
                         evaluation: Evaluation | None = None, keep: int = 0,
                         between: Callable[[], None] = lambda: None) -> Generated:
    """Make the images, feed the metrics. Collective over ranks.

    Args:
        writer: Where images go; default: nowhere.
        evaluation: Metrics, or None.
        keep: So many of the first images are returned.
        between: Called after each batch that all ranks have; may raise to stop.
    """
    writer, shown, featuring, started = writer or NoWriter(), {}, 0.0, time.perf_counter()
    all_ranks_have = -(-len(seeds) // batch_size) // distributed.world_size()
    for number, (start, chunk, images) in enumerate(generate(sampler, seeds, batch_size, writer)):
        began = time.perf_counter()
        if evaluation:
            evaluation.update(images, list(range(start, start + len(chunk))))
        featuring += time.perf_counter() - began
        shown.update((start + i, images[i].clone()) for i in range(len(chunk)) if start + i < keep)
        if number < all_ranks_have:
            between()
    seconds = time.perf_counter() - started - featuring
    return Generated(evaluation.results() if evaluation else None, shown, seconds)


def gathered_images(shown: dict[int, Tensor]) -> Tensor | None:
    """The images of all ranks in the order of their positions, (N, C, H, W), on rank 0. Collective."""
    parts = distributed.gather_objects(shown)
    images = {position: image for part in parts for position, image in part.items()}
    return torch.stack([images[position] for position in sorted(images)]) if distributed.rank() == 0 else None


def write_grid(shown: dict[int, Tensor], path, sampler: Sampler, seeds: Sequence[int]) -> None:
    """Tile the images of all ranks; those of a class-conditional network by class, of prompts by prompt. Collective."""
    images = gathered_images(shown)
    if distributed.rank() == 0:
        texts = getattr(sampler.prompts, "texts", None)
        if texts:
            return save_png(sheet_of_prompts(images, seeds, texts), path)
        labels = sampler.labels(seeds[:len(images)])
        save_png(tile(images) if labels is None else tile_by_class(images, labels.tolist()), path)


def sheet_of_prompts(images: Tensor, seeds: Sequence[int], texts: Sequence[str], most: int = 8) -> Tensor:
    """Under each prompt its images, ``most`` of them, uint8 (3, H', W')."""
    rows = {}
    for image, number in zip(images, seeds, strict=False):
        rows.setdefault(number // PROMPT_STRIDE, []).append(image)
    return captioned([(texts[p], torch.stack(row[:most])) for p, row in sorted(rows.items())])


def tile_by_class(images: Tensor, labels: list[int], most: int = 16) -> Tensor:
    """A row for each class in ascending order, as many columns as every class fills, at most ``most``."""
    rows = {label: [i for i, each in enumerate(labels) if each == label][:most] for label in sorted(set(labels))}
    columns = min(map(len, rows.values()))
    if len(rows) == 1 or columns < 2:                      # nothing to sort by
        order = sorted(range(len(labels)), key=lambda i: labels[i])
        return tile(images[order])
    return tile(images[[i for row in rows.values() for i in row[:columns]]], columns)
