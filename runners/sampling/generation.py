"""Many images from many seeds: dealt to ranks, resumable, streamed into files and metrics."""

import json
import logging
import re
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datasets.images import decode
from functions.ode import check_churn
from functions.pixels import to_uint8
from functions.rng import SeededNoise
from runners import distributed
from runners.diffusion import Diffusion
from runners.training.monitor import save_png, tile
from runners.training.plan import deal
from utils.atomic import atomic_path, atomic_write, remove_leftovers, write_json
from utils.errors import DataError, UserError

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ImageFolder:
    """Where image s lies: ``{s:06d}.png``, or in EDM's sub-folders of 1,000."""

    path: Path
    subdirs: bool = False

    def image(self, seed: int) -> Path:
        folder = self.path / f"{seed - seed % 1000:06d}" if self.subdirs else self.path
        return folder / f"{seed:06d}.png"

    def prepare(self, manifest: dict) -> None:
        """Write the manifest, or check that the folder's own one is the same.

        Raises:
            UserError: The folder holds images made in another way, or files of unknown origin.
        """
        file = self.path / MANIFEST
        self._refuse_foreign()
        if file.exists():
            try:
                stored = json.loads(file.read_text())
            except ValueError:
                raise DataError(f"{file}: not readable; remove the folder, or choose another --image_folder") from None
            different = [f"{key} {stored.get(key)!r}, now {manifest.get(key)!r}"
                         for key in sorted(stored.keys() | manifest.keys()) if stored.get(key) != manifest.get(key)]
            if different:
                raise UserError(f"{self.path} holds images made with other settings ({'; '.join(different)}); "
                                "choose another --image_folder")
        elif self.path.exists() and any(not p.name.startswith(".") for p in self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and has no {MANIFEST}; choose another --image_folder")
        else:
            write_json(file, manifest)
        remove_leftovers(self.path)

    def _refuse_foreign(self) -> None:
        foreign = [p for p in self.path.rglob("*") if p.is_file() and not p.name.startswith(".")
                   and not re.fullmatch(r"manifest\.json|\d{6,}\.png|samples_[\dx]+\.npz", p.name)]
        if foreign:
            raise UserError(f"{self.path} holds {len(foreign)} file(s) that were not made here, such as "
                            f"{min(foreign).name}; choose another --image_folder")


def manifest_of(diffusion: Diffusion, settings: dict) -> dict:
    """What determines the images beside the seed, as plain values."""
    config = diffusion.config
    return {
        "weights": diffusion.weights.fingerprint, "amp": str(diffusion.amp or "off"),
        "sampler": {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
        "model": config.model.model_dump(mode="json", include={"arch"}),
        "diffusion": config.diffusion.model_dump(mode="json"),
        "data": config.data.model_dump(mode="json", include={"image_size", "channels", "rescaled", "logit_transform"}),
    }


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
            pixels = decode(path.read_bytes(), str(path), self.shape[0], strict=True)
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
    """Rows of a memory-mapped array, which rank 0 wraps into ``samples_NxHxWxC.npz`` (key arr_0, as ADM has it)."""

    def __init__(self, folder: Path, count: int, shape: tuple[int, int, int]):
        c, h, w = shape
        self.target = folder / f"samples_{count}x{h}x{w}x{c}.npz"
        self.rows, self.flags = folder / f".{self.target.stem}.npy", folder / f".{self.target.stem}.done.npy"
        self.finished = self.target.exists()
        if self.finished:
            with np.load(self.target) as file:
                self.array = file["arr_0"]
            return
        if distributed.rank() == 0 and not self.flags.exists():
            np.lib.format.open_memmap(self.rows, "w+", np.uint8, (count, h, w, c)).flush()
            atomic_write(self.flags, lambda file: np.save(file, np.zeros(count, np.uint8)))
        distributed.barrier()
        self.array = np.load(self.rows, mmap_mode="r+")
        self.done = np.load(self.flags, mmap_mode="r+")

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
            self.rows.unlink()
            self.flags.unlink()


class NoWriter:
    """Images go to the metrics only."""

    def has(self, start: int, seeds: list[int]) -> bool:
        return False

    def write(self, start: int, seeds: list[int], images: Tensor) -> None:
        pass

    def close(self) -> None:
        pass


def generate(diffusion: Diffusion, seeds: list[int], settings: dict, batch_size: int, writer) -> Iterator[tuple]:
    """Make or find this rank's share of the images.

    Yields:
        (start, seeds, images): position of the batch in the list, its seeds, uint8 (B, C, H, W).
    """
    mine = deal(seeds, batch_size, distributed.rank(), distributed.world_size())
    chain = diffusion.chain(**settings)
    found = 0
    with tqdm(total=len(seeds), unit="img", desc="sampling", dynamic_ncols=True, disable=distributed.rank() > 0) as bar:
        for start, chunk in mine:
            if writer.has(start, chunk):
                images, found = writer.read(start, chunk), found + len(chunk)
            else:
                noise = SeededNoise(chunk, diffusion.device)
                images = to_uint8(chain(noise.randn((len(chunk), *diffusion.config.data.shape)), noise)).cpu()
                writer.write(start, chunk, images)
            bar.update(min(len(chunk) * distributed.world_size(), bar.total - bar.n))
            yield start, chunk, images
    writer.close()
    if found:
        log.info("%d images of rank 0's share were there already", found)


def write_grid(shown: dict[int, Tensor], path: Path) -> None:
    """Tile the images of all ranks, ``{position: uint8 (C, H, W)}``, in the order of their positions. Collective."""
    parts = distributed.gather_objects(shown)
    if distributed.rank() == 0:
        images = {position: image for part in parts for position, image in part.items()}
        save_png(tile(torch.stack([images[position] for position in sorted(images)])), path)


def parse_scaler(text: str | None) -> float | tuple[float, float] | None:
    """``"1.017"`` as a constant, ``"0.001,1.01"`` as (k, b).

    Raises:
        UserError: Neither one nor two numbers.
    """
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 2):
        raise UserError(f"--eps_scaler {text!r} is not B or K,B, such as 1.017 or 0.0005,1.01")
    return numbers[0] if len(numbers) == 1 else numbers


def parse_churn(text: str | None) -> tuple[float, ...] | None:
    """``"40"`` or ``"40,0.05,50,1.003"``: EDM's S_churn, S_min, S_max, S_noise.

    Raises:
        UserError: Not one to four numbers, or out of range.
    """
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
        check_churn(numbers)
    except ValueError as error:
        raise UserError(f"--churn {text!r}: {error}") from None
    return numbers
