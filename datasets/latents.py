"""Latents and embeddings of prompts, made once: a folder of arrays that is whole or absent, and resumes half-made.

    .packed/NAME-FINGERPRINT.latents/     about.json   moments.npy (N, V, 2, C, h, w)   time_ids.npy (N, V, 6)
                                          prompt_embeds.npy (N, L, D)   pooled_embeds.npy (N, P)
                                          empty_prompt_embeds.npy (L, D)   empty_pooled_embeds.npy (P,)

While it is made it is called ``.NAME-FINGERPRINT.latents.partial`` and holds ``done.npy``, a byte for each image.
Row i is image i, in V variants: crops and their mirror images. ``moments`` are mean and standard deviation.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datasets.images import UnreadableImage
from datasets.labels import no_labels
from datasets.packed import ImageStore, choose_cache, to_device
from datasets.packing import allocate, check_bad, check_space, list_bad
from utils.atomic import atomic_write, write_json
from utils.errors import DataError, UserError
from utils.files import read_json
from utils.locks import exclusive
from utils.safe_load import map_npy

log = logging.getLogger(__name__)
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}              # the latter is stored as uint16
SHARED = "empty"                              # rows that belong to no image: the empty prompt


class LatentStore(ImageStore):
    """Latents by index; ``batches`` yields moments, (B, V, 2, C, h, w) float32 on the device.

    Attributes:
        captions: A text for each image, or None.
        empty: What stands for no prompt, a row for each condition; {} for networks without prompts.
    """

    def __init__(self, name: str, device: torch.device, cache: str, about: dict, arrays: dict[str, np.ndarray],
                 empty: dict[str, np.ndarray]):
        kept = about["kept"]
        super().__init__(name=name, fingerprint=about["fingerprint"], labels=no_labels(len(kept)),
                         device=device)
        self.kept, self.captions = torch.tensor(kept), about["captions"]
        self.meant = TYPES[about["dtype"]]
        size = sum(array.nbytes for array in arrays.values())
        if cache == "auto":
            cache = choose_cache(size, device)
        place = {"device": device, "ram": "cpu"}
        self.arrays = {key: self._tensor(array).to(place[cache]) if cache in place else array
                       for key, array in arrays.items()}
        self.empty = {key: self._tensor(row).float().to(device) for key, row in empty.items()}
        log.info("%s: latents of %d images in %d variants, %.1f MB, data.cache %s", name, len(kept),
                 arrays["moments"].shape[1], size / 1e6, cache)

    def _tensor(self, rows: np.ndarray) -> Tensor:
        """In the type that was meant: CUDA does not index uint16."""
        rows = torch.tensor(np.asarray(rows))
        return rows.view(self.meant) if rows.dtype == torch.uint16 else rows

    def _gather(self, key: str, indices: Tensor) -> Tensor:
        array, rows = self.arrays[key], self.kept[indices.cpu()]
        found = array[to_device(rows, array.device)] if isinstance(array, Tensor) else self._tensor(array[rows.numpy()])
        return to_device(found, self.device).float()

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
        DataError: Bad images, or a store without them; a damaged store; no space. UserError: ``data.cache off``.
    """
    if cache == "off":
        raise UserError("data.cache off: latents are packed once, whatever their number; use auto, device, ram or mmap")
    target = folder / f"{images.name}-{fingerprint}.latents"
    if not (target / "about.json").is_file():
        with exclusive(folder / f"{images.name}.latents.lock", f"packing latents of {images.name}"):
            if not (target / "about.json").is_file():
                _Packing(target, images, fingerprint, dtype, captions, skip_bad).run(encode, empty)
    about, arrays, shared = _read(target)
    list_bad(about["bad"], skip_bad)
    return LatentStore(images.name, torch.device(device), cache, about, arrays, shared)


def _read(folder: Path) -> tuple[dict, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What about.json says, the arrays of the images and the rows of the empty prompt. DataError: damaged."""
    try:
        about = read_json(folder / "about.json")
        arrays = {key: map_npy(folder / f"{key}.npy") for key in about["arrays"]}
        empty = {key: map_npy(folder / f"{SHARED}_{key}.npy") for key in arrays if key.endswith("_embeds")}
        rows, kept = len(arrays["moments"]), about["kept"]
        if not (kept and all(type(i) is int and 0 <= i < rows for i in kept)):
            raise ValueError("other images than it has arrays of")
        if about["captions"] is not None and len(about["captions"]) != len(kept):
            raise ValueError("as many captions as images are wanted")
        if about["dtype"] not in TYPES or not all(len(entry) == 2 for entry in about["bad"]):
            raise ValueError("an unknown dtype, or no list of bad images")
    except Exception as error:                # whatever a damaged file makes of it
        raise DataError(f"{folder}: damaged ({error}); remove it, and it is made again") from None
    return about, arrays, empty


class _Packing:
    def __init__(self, target: Path, images, fingerprint: str, dtype: str, captions: list[str] | None, skip_bad: int):
        self.target, self.images, self.fingerprint = target, images, fingerprint
        self.dtype, self.captions, self.skip_bad = dtype, captions, skip_bad
        self.partial = target.with_name(f".{target.name}.partial")

    def run(self, encode, empty) -> None:
        count, bad = len(self.images), {}
        arrays = self._found(count)
        if arrays:
            done = arrays.pop("done")
            log.info("packing latents of %s goes on: %d of %d images are there", self.images.name, (done == 1).sum(),
                     count)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            done = self._make("done", (count,), np.uint8)
        for i in tqdm(range(count), f"latents of {self.images.name}", unit="img", disable=None):
            if done[i] == 1:
                continue
            try:
                rows = encode(i)
            except UnreadableImage as error:
                bad[i] = str(error)
                check_bad([*bad.values()], self.skip_bad)
                continue
            arrays = arrays or self._open(rows, count)
            if lost := rows.keys() - arrays.keys():
                raise DataError(f"{self.partial}: damaged (no {', '.join(sorted(lost))}); remove it, and it is made "
                                "again")
            for key, row in rows.items():
                arrays[key][i] = self._stored(key, row)
            for array in arrays.values():
                array.flush()
            done[i] = 1                                   # after its rows: a kill in between costs this image only
            done.flush()
        if not arrays:
            raise DataError(f"{self.images.name}: every image is unreadable")
        self._finish(np.flatnonzero(done == 1), list(arrays), empty(), bad)

    def _found(self, count: int) -> dict[str, np.ndarray]:
        """``done`` and the arrays of an earlier start, by name; {} where no image is done or one is damaged."""
        paths = [path for path in self.partial.glob("*.npy") if not path.name.startswith(SHARED)]
        try:
            arrays = {path.stem: map_npy(path) for path in paths}      # "r+" would fill up a file that is cut off
        except DataError as error:
            log.warning("packing latents of %s begins again: %s", self.images.name, error)
            return {}
        if not all(array.shape[:1] == (count,) for array in arrays.values()) or 1 not in arrays.get("done", ()):
            return {}
        return {path.stem: np.lib.format.open_memmap(path, "r+") for path in paths}

    def _make(self, key: str, shape: tuple[int, ...], dtype) -> np.ndarray:
        path = self.partial / f"{key}.npy"
        allocate(path, shape, dtype)
        return np.lib.format.open_memmap(path, "r+")

    def _open(self, rows: dict[str, Tensor], count: int) -> dict[str, np.ndarray]:
        stored = {key: self._stored(key, row) for key, row in rows.items()}
        size = count * sum(row.nbytes for row in stored.values())
        log.info("packing latents of %s: %d images into %.1f MB", self.images.name, count, size / 1e6)
        check_space(f"latents of {self.images.name}", size, self.partial.parent,
                    "free some disk, or lower data.variants or data.max_size")
        return {key: self._make(key, (count, *row.shape), row.dtype) for key, row in stored.items()}

    def _stored(self, key: str, row: Tensor) -> np.ndarray:
        if key == "time_ids":
            return row.float().numpy()                    # sizes above 2,048 are no float16
        meant = TYPES[self.dtype]
        if not torch.isfinite(row.to(meant)).all():
            raise DataError(f"{self.images.name}: {key} beyond the range of {self.dtype}; set data.latent_dtype "
                            "bfloat16")
        row = row.to(meant)
        return (row.view(torch.uint16) if meant is torch.bfloat16 else row).numpy()

    def _finish(self, kept: np.ndarray, keys: list[str], empty: dict[str, Tensor], bad: dict[int, str]) -> None:
        for key, row in empty.items():
            atomic_write(self.partial / f"{SHARED}_{key}.npy", partial(np.save, arr=self._stored(key, row)))
        captions = self.captions and [self.captions[i] for i in kept]
        write_json(self.partial / "about.json", {
            "fingerprint": self.fingerprint, "dtype": self.dtype, "arrays": keys, "kept": kept.tolist(),
            "captions": captions, "images": self.images.identity,
            "bad": [[self.images.reader.name(i), reason] for i, reason in bad.items()]})
        if self.target.exists():                          # without about.json: nobody can have used it
            shutil.rmtree(self.target)
        os.replace(self.partial, self.target)
        (self.target / "done.npy").unlink(missing_ok=True)
