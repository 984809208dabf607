"""Latents and embeddings of prompts, made once: a folder of arrays that is whole or absent, and resumes half-made.

    .packed/NAME-FINGERPRINT.latents/     about.json   moments.npy (N, V, 2, C, h, w)   time_ids.npy (N, V, 6)
                                          prompt_embeds.npy (N, L, D)   pooled_embeds.npy (N, P)   empty.npz

While it is made it is called ``.NAME-FINGERPRINT.latents.partial`` and holds ``done.npy``, a byte for each image.
Row i is image i, in V variants: crops and their mirror images. ``moments`` are mean and standard deviation.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.packed import ImageStore, _choose_cache
from datasets.packing import DISK_SHARE, TooLarge
from utils.atomic import write_json
from utils.errors import DataError, UserError
from utils.locks import exclusive
from utils.safe_load import map_npy

log = logging.getLogger(__name__)
TYPES = {"float16": (np.float16, torch.float16), "bfloat16": (np.uint16, torch.bfloat16)}   # as stored, as meant
SHARED = "empty"                              # rows that belong to no image: the empty prompt


class LatentStore(ImageStore):
    """Latents by index; ``batches`` yields moments, (B, V, 2, C, h, w) float32 on the device.

    Attributes:
        captions: A text for each image, or None.
        empty: What stands for no prompt, a row for each condition; {} for networks without prompts.
    """

    def __init__(self, folder: Path, name: str, device: torch.device, cache: str):
        about = json.loads((folder / "about.json").read_text())
        kept = about["kept"]
        super().__init__(name=name, fingerprint=about["fingerprint"], labels=np.full(len(kept), -1, np.int64),
                         device=device)
        self.kept, self.captions = torch.tensor(kept), about["captions"]
        self.stored, self.meant = TYPES[about["dtype"]]
        arrays = {key: map_npy(folder / f"{key}.npy") for key in about["arrays"]}
        size = sum(array.nbytes for array in arrays.values())
        if cache == "auto":
            cache = _choose_cache(size, device)
        place = {"device": device, "ram": "cpu"}
        self.arrays = {key: torch.tensor(array).to(place[cache]) if cache in place else array
                       for key, array in arrays.items()}
        self.empty = {key: self._tensor(map_npy(folder / f"{SHARED}_{key}.npy")).to(device)
                      for key in about["arrays"] if key.endswith("_embeds")}
        log.info("%s: latents of %d images in %d variants, %.1f MB, data.cache %s", name, len(kept),
                 arrays["moments"].shape[1], size / 1e6, cache)

    def _tensor(self, rows) -> Tensor:
        """float32 of what was stored."""
        rows = rows if isinstance(rows, Tensor) else torch.tensor(np.asarray(rows))
        return (rows.view(self.meant) if rows.dtype == torch.uint16 else rows).float()

    def _gather(self, key: str, indices: Tensor) -> Tensor:
        array, rows = self.arrays[key], self.kept[indices.cpu()]
        found = array[rows.to(array.device)] if isinstance(array, Tensor) else array[rows.numpy()]
        return self._tensor(found).to(self.device, non_blocking=True)

    def batches(self, index_lists: Iterable[Tensor]) -> Iterator[Tensor]:
        for indices in index_lists:
            yield self._gather("moments", indices)

    def condition(self, indices: Tensor) -> dict[str, Tensor]:
        """Of images (B,): embeddings (B, ...), and ``time_ids`` of their variants, (B, V, 6)."""
        return {key: self._gather(key, indices) for key in self.arrays if key != "moments"}


def choose_variant(moments: Tensor, condition: dict[str, Tensor], generator: torch.Generator | None = None):
    """One variant of each image: a draw, or without ``generator`` the first.

    Returns:
        Moments (B, 2, C, h, w), and the condition with ``time_ids`` (B, 6).
    """
    count, variants = moments.shape[:2]
    drawn = torch.zeros(count, dtype=torch.long, device=moments.device)
    if generator is not None and variants > 1:
        drawn = torch.randint(variants, (count,), generator=generator, device=moments.device)
    rows = torch.arange(count, device=moments.device)
    if "time_ids" in condition:
        condition = {**condition, "time_ids": condition["time_ids"][rows, drawn]}
    return moments[rows, drawn], condition


# -------------------------------------------------------------------------------------------------------------- making


def open_latents(folder: Path, images, *, fingerprint: str, dtype: str, captions: list[str] | None, device, cache: str,
                 skip_bad: int, encode: Callable[[int], dict[str, Tensor]],
                 empty: Callable[[], dict[str, Tensor]]) -> LatentStore:
    """The store in ``folder`` (``exp/datasets/.packed``); made first, or made to the end, by one process.

    Args:
        images: ImageDataset.
        fingerprint: Of the images and the model.
        captions: For the record.
        encode: Image -> its rows by the name of their array: ``moments`` (V, 2, C, h, w), ``time_ids`` (V, 6),
            ``prompt_embeds`` (L, D), ...; UnreadableImage (a DataError) for one that is left out.
        empty: The rows of the empty prompt.
        skip_bad: Images that may be left out.

    Raises:
        DataError: Bad images, a store without them, no space. UserError: ``data.cache off``.
    """
    if cache == "off":
        raise UserError("data.cache off: latents are packed once, whatever their number; use auto, device, ram or mmap")
    target = folder / f"{images.name}-{fingerprint}.latents"
    if not (target / "about.json").is_file():
        with exclusive(folder / f"{images.name}.latents.lock", f"packing latents of {images.name}"):
            if not (target / "about.json").is_file():
                _Packing(target, images, fingerprint, dtype, captions, skip_bad).run(encode, empty)
    return LatentStore(target, images.name, torch.device(device), cache)


class _Packing:
    def __init__(self, target: Path, images, fingerprint: str, dtype: str, captions: list[str] | None, skip_bad: int):
        self.target, self.images, self.fingerprint = target, images, fingerprint
        self.dtype, self.captions, self.skip_bad = dtype, captions, skip_bad
        self.partial = target.with_name(f".{target.name}.partial")

    def run(self, encode, empty) -> None:
        from tqdm import tqdm

        count = len(self.images)
        self.partial.mkdir(parents=True, exist_ok=True)
        arrays, done, bad = {}, self._done(count), {}
        found = int((done == 1).sum())
        if found:
            log.info("packing latents of %s goes on: %d of %d images are there", self.images.name, found, count)
        for i in tqdm(range(count), f"latents of {self.images.name}", initial=0, unit="img", disable=None):
            if done[i] == 1:
                continue
            try:
                rows = encode(i)
            except DataError as error:
                bad[i] = str(error)
                if len(bad) > self.skip_bad:
                    raise DataError(f"{error} ({len(bad)} bad so far; data.skip_bad allows {self.skip_bad})") from None
                log.warning("left out: %s", error)
                continue
            arrays = arrays or self._open(rows, count)
            for key, row in rows.items():
                arrays[key][i] = self._stored(key, row)
            for array in arrays.values():
                array.flush()
            done[i] = 1                                   # after its rows: a kill in between costs this image only
            done.flush()
        if not (done == 1).any():
            raise DataError(f"{self.images.name}: every image is unreadable")
        self._finish(np.flatnonzero(done == 1), list(arrays or self._open(encode(int(done.argmax())), count)), empty())

    def _done(self, count: int) -> np.ndarray:
        path = self.partial / "done.npy"
        try:
            done = np.lib.format.open_memmap(path, "r+")
            if done.shape == (count,) and done.dtype == np.uint8:
                return done
        except (OSError, ValueError):
            pass
        return np.lib.format.open_memmap(path, "w+", np.uint8, (count,))

    def _open(self, rows: dict[str, Tensor], count: int) -> dict[str, np.ndarray]:
        self._check_space(rows, count)
        arrays = {}
        for key, row in rows.items():
            path, stored = self.partial / f"{key}.npy", self._stored(key, row)
            shape = (count, *stored.shape)
            fits = path.exists() and np.lib.format.open_memmap(path, "r").shape == shape
            arrays[key] = np.lib.format.open_memmap(path, "r+") if fits else np.lib.format.open_memmap(
                path, "w+", stored.dtype, shape)
        return arrays

    def _check_space(self, rows: dict[str, Tensor], count: int) -> None:
        size, free = 2 * count * sum(row.numel() for row in rows.values()), shutil.disk_usage(self.partial).free
        log.info("packing latents of %s: %d images into %.1f MB", self.images.name, count, size / 1e6)
        if size > free / DISK_SHARE:
            raise TooLarge(f"latents of {self.images.name} would take {size / 1e9:.1f} GB, more than a quarter of the "
                           f"{free / 1e9:.1f} GB that are free in {self.partial.parent}; free some disk, or lower "
                           "data.variants or data.max_size")

    def _stored(self, key: str, row: Tensor) -> np.ndarray:
        if key == "time_ids":
            return row.float().numpy()                    # sizes above 2,048 are no float16
        _, meant = TYPES[self.dtype]
        if not torch.isfinite(row.to(meant)).all():
            raise DataError(f"{self.images.name}: {key} beyond the range of {self.dtype}; set data.latent_dtype "
                            "bfloat16")
        row = row.to(meant)
        return (row.view(torch.uint16) if meant is torch.bfloat16 else row).numpy()

    def _finish(self, kept: np.ndarray, keys: list[str], empty: dict[str, Tensor]) -> None:
        for key, row in empty.items():
            np.save(self.partial / f"{SHARED}_{key}.npy", self._stored(key, row))
        captions = self.captions and [self.captions[i] for i in kept]
        write_json(self.partial / "about.json", {
            "fingerprint": self.fingerprint, "dtype": self.dtype, "arrays": keys, "kept": kept.tolist(),
            "captions": captions, "images": self.images.identity})
        if self.target.exists():                          # without about.json: nobody can have used it
            shutil.rmtree(self.target)
        os.replace(self.partial, self.target)
        (self.target / "done.npy").unlink(missing_ok=True)
