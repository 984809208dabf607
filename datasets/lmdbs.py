"""Images in LMDB: one value for each image, encoded like a file or as raw RGB pixels."""

import math
import os
import re
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from datasets.files import file_stamp
from datasets.images import UnreadableImage, decode, encoded
from datasets.lmdb_scan import scan
from datasets.reader import Reader
from utils.errors import DataError

_OPENING = threading.Lock()
_OPEN = {}          # real path -> ((process id, stamp), environment): LMDB allows one for each file and process


class Keys(Sequence):
    """Byte strings of any content in two arrays: forked workers share them, which they would not share a list."""

    def __init__(self, keys: Sequence[bytes]):
        self.text = b"".join(keys)
        self.ends = np.cumsum([0, *map(len, keys)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> bytes:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.text[self.ends[i]:self.ends[i + 1]]


class LmdbImages(Reader):
    """The images of an LMDB folder or file, read-only and without lock.

    Args:
        path: The LMDB; not opened before it is asked for something.
        channels: What ``read`` returns: 1 (grey) or 3 (RGB).
        find_keys: ``(all keys, value of the key "length" or None, path) -> keys of the images``, in their order.

    Safe under fork and spawn: the environment belongs to the process that opened it, and is never pickled.
    """

    def __init__(self, path: str | Path, channels: int, find_keys: Callable):
        self.path, self.channels, self.find_keys = Path(path), channels, find_keys

    @cached_property
    def keys(self) -> Keys:
        """One for each image. Raises DataError: missing, damaged, no LMDB, or of another form."""
        file = _data_file(self.path)
        file_stamp(file)
        return Keys(self.find_keys(*scan(self.path, file, _close_all), self.path))

    @cached_property
    def raw_length(self) -> int | None:
        """Bytes of every record if they are raw pixels; None if they are encoded. The first record decides."""
        first = self.value(0)
        if encoded(first):
            return None
        side = math.isqrt(len(first) // 3)
        if not first or 3 * side * side != len(first):
            raise UnreadableImage(f"{self.name(0)}: neither an encoded image nor 3 x side x side raw bytes "
                                  f"({len(first)} bytes)")
        return len(first)

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, i: int) -> str:
        return f"{self.path}, key {self.keys[i].decode(errors='backslashreplace')}"

    def value(self, i: int) -> bytes:
        import lmdb

        key = self.keys[i]                                 # the scan has been there: what is read now is in bounds
        try:
            with environment(self.path).begin() as transaction:
                value = transaction.get(key)
        except lmdb.Error as error:
            raise UnreadableImage(f"{self.name(i)}: damaged: {error}") from None
        if value is None:
            raise DataError(f"{self.name(i)}: missing")
        return value

    def read(self, i: int) -> np.ndarray:
        """Pixels of image ``i``: uint8, (H, W, channels). Raises DataError naming the key."""
        if self.raw_length is None:
            return decode(self.value(i), self.name(i), self.channels)
        return self._read_raw(self.value(i), i)

    def _read_raw(self, value: bytes, i: int) -> np.ndarray:
        if self.channels != 3:
            raise DataError(f"{self.path}: holds raw RGB pixels (3 channels), data.channels is {self.channels}")
        if len(value) != self.raw_length:
            raise UnreadableImage(f"{self.name(i)}: wrong record length: {len(value)} bytes, "
                                  f"the others have {self.raw_length}")
        side = math.isqrt(len(value) // 3)
        return np.frombuffer(value, np.uint8).reshape(side, side, 3)

    def stamp(self) -> str:
        return file_stamp(_data_file(self.path))

    def contents(self) -> str:
        return f"{self.path} has no keys of images"


def environment(path: Path):
    """The read-only LMDB environment of this process for ``path``.

    Raises:
        DataError: Missing, truncated or no LMDB.
    """
    file = _data_file(path)
    key, asked = os.path.realpath(file), (os.getpid(), file_stamp(file))
    if key not in _OPEN or _OPEN[key][0] != asked:
        with _OPENING:
            if key not in _OPEN or _OPEN[key][0] != asked:
                _OPEN[key] = asked, _open(path, file, _OPEN.pop(key, (None, None))[1])
    return _OPEN[key][1]


def _close_all() -> None:
    """In a child: let go of the parent's environments, of which LMDB does not want a second."""
    while _OPEN:
        _OPEN.popitem()[1][1].close()


def _open(path: Path, file: Path, found):
    import lmdb

    if found is not None:            # a parent's, seen after a fork, or of a file since replaced: let go of it
        found.close()
    try:
        found = lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise DataError(f"{path}: not a usable LMDB: {error}") from None
    if (found.info()["last_pgno"] + 1) * found.stat()["psize"] > os.path.getsize(file):
        found.close()                # reading past the end of a mapped file would kill the process
        raise DataError(f"{file}: truncated: shorter than its own index says")
    return found


def all_keys(keys: list[bytes], length: bytes | None, path: Path) -> list[bytes]:
    """Every key, in LMDB's order: LSUN."""
    return keys


def numbered_keys(keys: list[bytes], length: bytes | None, path: Path) -> list[bytes]:
    """``b"0"``, ``b"1"``, ... without a gap; other keys (``length``) are not images: CelebA-HQ."""
    found = {int(key) for key in keys if key.isdigit()}
    missing = set(range(len(found))) - found
    if missing:
        raise DataError(f"{path}: key {min(missing)} is missing, though {str(max(found))[:40]} is there")
    return [b"%d" % i for i in range(len(found))]


def resolution_keys(resolution: int, keys: list[bytes], length: bytes | None, path: Path) -> list[bytes]:
    """``{resolution}-{i:05d}`` for i < ``length``: the FFHQ of DDIM, as StyleGAN 2's prepare_data writes it."""
    if length is None or not re.fullmatch(rb"\d{1,12}", length):
        raise DataError(f"{path}: the key 'length' is {'missing' if length is None else 'not a number'}")
    if int(length) > len(keys):
        raise DataError(f"{path}: the key 'length' says {int(length):,}, but there are {len(keys):,} keys in all")
    wanted = [b"%d-%05d" % (resolution, i) for i in range(int(length))]
    if wanted and wanted[0] not in keys:
        sizes = {int(m[1]) for key in keys if (m := re.fullmatch(rb"(\d{1,9})-0+", key))}
        raise DataError(f"{path}: has no images of side {resolution}, only of {sorted(sizes)}; "
                        "change data.image_size, or convert the images")
    return wanted


def any_keys(keys: list[bytes], length: bytes | None, path: Path) -> list[bytes]:
    """The images of an LMDB of unknown origin: every key but ``length``, in numerical order where all are numbers."""
    keys = [key for key in keys if key != b"length"]
    return sorted(keys, key=int) if all(key.isdigit() for key in keys) else keys


def _data_file(path: Path) -> Path:
    return path / "data.mdb" if path.is_dir() else path
