"""Write images into the on-disk formats: zip and folder as EDM lays them out, LMDB, or one npy array."""

import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.labels import LABELS
from utils.atomic import atomic_path
from utils.errors import DataError, UserError
from utils.processes import removed_if_killed

Item = tuple[np.ndarray, bytes, int | list]                # pixels (H, W, C), the same encoded, label


def encode(pixels: np.ndarray, jpeg: int | None = None) -> bytes:
    """An image file: PNG, which loses nothing, or JPEG of the given quality."""
    file = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if jpeg is None:
        image.save(file, "PNG", compress_level=1)
    else:
        image.save(file, "JPEG", quality=jpeg, subsampling=0)
    return file.getvalue()


def member_name(i: int, suffix: str) -> str:
    """EDM's: 1,000 images in each folder, ``00012/img00012345.png``."""
    return f"{i // 1000:05d}/img{i:08d}{suffix}"


def write_zip(items: Iterable[Item], dest: Path, suffix: str) -> None:
    with _atomic_file(dest) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        labels = {}
        for i, (_, data, label) in enumerate(items):
            labels[member_name(i, suffix)] = label
            archive.writestr(zipfile.ZipInfo(member_name(i, suffix)), data)          # no clock: same input, same bytes
        archive.writestr(zipfile.ZipInfo(LABELS), _labels_json(labels))


def write_folder(items: Iterable[Item], dest: Path, suffix: str) -> None:
    with atomic_folder(dest) as temporary:
        labels = {}
        for i, (_, data, label) in enumerate(items):
            file = temporary / member_name(i, suffix)
            if i % 1000 == 0:
                file.parent.mkdir()
            file.write_bytes(data)
            labels[member_name(i, suffix)] = label
        (temporary / LABELS).write_text(_labels_json(labels))


def write_lmdb(items: Iterable[Item], dest: Path, suffix: str) -> None:
    """Encoded images under ``str(i)``: what CELEBAHQ and LSUN read."""
    import lmdb

    with atomic_folder(dest) as temporary:
        try:
            with lmdb.open(str(temporary), map_size=1 << 40) as environment:
                batch = []
                for i, (_, data, _) in enumerate(items):
                    batch.append((str(i).encode(), data))
                    if len(batch) == 1000:
                        _put(environment, batch)
                _put(environment, batch)
                environment.sync(True)
        except lmdb.Error as error:                        # a full disk above all
            raise DataError(f"{dest}: cannot be written: {error}") from None


def write_npy(items: Iterable[Item], dest: Path, suffix: str) -> None:
    """One uint8 array (N, H, W, C); N is written last, because it is known last."""
    with _atomic_file(dest) as temporary, open(temporary, "wb") as file:
        count, shape = 0, ()
        for pixels, _, _ in items:
            if not count:
                shape = pixels.shape
                _npy_header(file, 0, shape)
            file.write(pixels.tobytes())
            count += 1
        file.seek(0)
        _npy_header(file, count, shape)


FORMATS = {"zip": write_zip, "folder": write_folder, "lmdb": write_lmdb, "npy": write_npy}


def format_of(dest: Path) -> str:
    """The format that a name asks for: .zip, .npy, .lmdb; anything else is a folder."""
    return dest.suffix[1:] if dest.suffix[1:] in FORMATS else "folder"


@contextmanager
def _atomic_file(dest: Path) -> Iterator[Path]:
    """``atomic_path`` that leaves nothing behind even when this process is killed."""
    with atomic_path(dest) as temporary, removed_if_killed(temporary):
        yield temporary


@contextmanager
def atomic_folder(dest: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``dest`` on success and is removed on failure, even when we are killed."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", suffix=".tmp", dir=dest.parent))
    try:
        with removed_if_killed(temporary):
            yield temporary
        temporary.chmod(0o755)
        os.replace(temporary, dest)                        # works onto an empty folder too
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(dest: Path, kind: str) -> None:
    """Raises UserError if something is there already, but an empty folder for a format that is one: nothing of the
    user's is overwritten."""
    if dest.is_file() or (dest.is_dir() and (kind in ("zip", "npy") or any(dest.iterdir()))):
        raise UserError(f"{dest} exists already; choose another --dest, or remove it")


def _labels_json(labels: dict[str, int | list]) -> str:
    known = any(label != -1 for label in labels.values())
    return json.dumps({"labels": list(map(list, labels.items())) if known else None})


def _put(environment, batch: list) -> None:
    with environment.begin(write=True) as transaction:
        for key, value in batch:
            transaction.put(key, value)
    batch.clear()


def _npy_header(file, count: int, shape: tuple) -> None:   # numpy pads it so that count may grow in place
    np.lib.format.write_array_header_1_0(file, {"shape": (count, *shape), "fortran_order": False, "descr": "|u1"})
