"""Data sets that lie as arrays: CIFAR-10 batches, npz and npy files, the digits of scikit-learn."""

import gzip
import math
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from datasets.files import file_stamp, open_zip
from datasets.labels import class_array, no_labels
from datasets.reader import Reader
from utils.errors import DataError
from utils.files import MIB, open_regular
from utils.safe_load import load_pickle, map_npy, member_start, read_npy_header

BATCH_LIMIT = 64 * MIB                                     # of CIFAR-10's pickles, which have 31 MB
BOMB_SIZE, BOMB_RATIO = 64 * MIB, 100                      # images shrink ten times at most; zeros a thousand times
CIFAR10_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))


class ArrayImages(Reader):
    """Images that need no decoding.

    Args:
        files: What is read, for the fingerprint and for messages; one array comes from each.
        load: ``(file) -> (images uint8 (n, H, W, C), labels (n,) or None)``; views and memory maps are welcome.
        channels: C that is wanted.
    """

    parallel = False                                       # nothing to decode

    def __init__(self, files: list[Path], load: Callable, channels: int):
        self.files, self.load, self.channels = files, load, channels

    @cached_property
    def shards(self) -> list[np.ndarray]:
        """[(n, H, W, C), ...], one for each file. Raises DataError naming a file that does not fit."""
        return [images for images, _ in self._loaded]

    @cached_property
    def _loaded(self) -> list:
        loaded = [(_checked(images, file, self.channels), None if labels is None else class_array(labels, str(file)))
                  for file in self.files for images, labels in [self.load(file)]]
        for file, (images, labels) in zip(self.files, loaded, strict=True):
            if images.shape[1:] != loaded[0][0].shape[1:]:
                raise DataError(f"{file}: images of {images.shape[1:]}, those of {self.files[0]} are "
                                f"{loaded[0][0].shape[1:]} (height, width, channels)")
            if labels is not None and len(labels) != len(images):
                raise DataError(f"{file}: {len(labels)} labels for {len(images)} images")
        return loaded

    @cached_property
    def starts(self) -> np.ndarray:
        return np.cumsum([0] + [len(shard) for shard in self.shards])

    @cached_property
    def labels(self) -> np.ndarray:
        """int64, (N,); -1 where a file has none."""
        return np.concatenate([no_labels(len(images)) if labels is None else labels
                               for images, labels in self._loaded])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _find(self, i: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        return shard, i - int(self.starts[shard])

    def name(self, i: int) -> str:
        shard, row = self._find(i)
        return f"{self.files[shard]}[{row}]"

    def read(self, i: int) -> np.ndarray:
        shard, row = self._find(i)
        return self.shards[shard][row]

    def stamp(self) -> str:
        return "".join(map(file_stamp, self.files))

    def contents(self) -> str:
        return f"{', '.join(map(str, self.files))} has an array of none"

    def __getstate__(self):                                # a spawned worker loads for itself
        cached = {"shards", "_loaded", "starts", "labels"}
        return {key: value for key, value in self.__dict__.items() if key not in cached}


def _checked(images: np.ndarray, file: Path, channels: int) -> np.ndarray:
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4:
        raise DataError(f"{file}: must hold uint8 images (N, height, width, channels), "
                        f"holds {images.dtype} {images.shape}")
    if images.shape[-1] != channels:
        raise DataError(f"{file}: the images have {images.shape[-1]} channel(s), data.channels is {channels}")
    if 0 in images.shape[1:]:
        raise DataError(f"{file}: empty images of shape {images.shape[1:]}")
    return images


def cifar10_batch(path: Path):
    """One pickled batch of CIFAR-10 as its authors publish it; nothing in it is executed."""
    batch = load_pickle(path)
    if not isinstance(batch, dict):
        raise DataError(f"{path}: not a CIFAR-10 batch (a dictionary with data and labels)")
    data, labels = (batch.get(key.encode(), batch.get(key)) for key in ("data", "labels"))
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3 * 32 * 32 or labels is None:
        raise DataError(f"{path}: not a CIFAR-10 batch (data of (n, 3072) and labels)")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def cifar10_tar(path: Path):
    """The 50,000 training images of ``cifar-10-python.tar.gz``, as EDM's tool takes them."""
    wanted = [f"cifar-10-batches-py/{name}" for name in CIFAR10_BATCHES]
    images, labels = [], []
    open_regular(path).close()                             # a pipe or a device would never end
    try:
        with tarfile.open(path) as archive, tempfile.TemporaryDirectory() as folder:
            for member in archive:
                if member.size > BATCH_LIMIT:              # also of those that are only passed over
                    raise DataError(f"{path}: {member.name} unpacks to {member.size / MIB:,.0f} MiB: a batch of "
                                    f"CIFAR-10 may have {BATCH_LIMIT // MIB}")
                if member.name in wanted and member.isreg():
                    copy = Path(folder) / member.name.rpartition("/")[2]
                    copy.write_bytes(archive.extractfile(member).read())
            for name in CIFAR10_BATCHES:
                if (Path(folder) / name).is_file():
                    batch = cifar10_batch(Path(folder) / name)
                    images.append(batch[0])
                    labels.append(class_array(batch[1], f"{path}, {name}"))
    except DataError:
        raise
    except Exception as error:                # TarError, OSError, EOFError, zlib.error, ...
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not images:
        raise DataError(f"{path}: holds no cifar-10-batches-py/data_batch_*")
    return np.concatenate(images), np.concatenate(labels)


def imagenet_batch(height: int, width: int, path: Path):
    """One npz of downsampled ImageNet: ``data`` (n, 3*H*W), channels first; ``labels`` from 1, if there."""
    data = npz_array(path, "data")
    if data.ndim != 2 or data.shape[1] != 3 * height * width:
        raise DataError(f"{path}: 'data' has shape {data.shape}, images of 3x{height}x{width} need "
                        f"(n, {3 * height * width}); change data.image_size, or use the other ImageNet")
    labels = class_array(npz_array(path, "labels"), f"{path}, labels") - 1 if "labels" in npz_keys(path) else None
    return data.reshape(-1, 3, height, width).transpose(0, 2, 3, 1), labels


def npz_images(path: Path):
    """DDPM-IP's single array: ``arr_0`` (N, H, W, C), labels in ``arr_1`` if there."""
    labels = npz_array(path, "arr_1") if "arr_1" in npz_keys(path) else None
    return npz_array(path, "arr_0"), labels


def npy_images(path: Path):
    """One npy array (N, H, W, C), memory-mapped."""
    return map_npy(path), None


def digits(path: Path):
    """scikit-learn's 1,797 handwritten digits, 8x8 with 17 grey levels; read without importing scikit-learn (2 s)."""
    try:
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return np.rint(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1), table[:, 64].astype(np.int64)


def npz_keys(path: Path) -> list[str]:
    with open_zip(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def npz_array(path: Path, key: str) -> np.ndarray:
    """Array ``key`` of an npz file: memory-mapped where it is stored, in memory where it is compressed.

    Raises:
        DataError: No such key (lists those there), a pickled object, or a broken file.
    """
    with open_zip(path) as archive:
        if f"{key}.npy" not in archive.namelist():
            raise DataError(f"{path}: has no array {key!r}, only {', '.join(sorted(npz_keys(path))) or 'nothing'}")
        info = archive.getinfo(f"{key}.npy")
        try:
            if info.compress_type == zipfile.ZIP_STORED:
                return _map_member(path, info)
            return _unpack_member(archive, info)
        except Exception as error:            # zlib.error, BadZipFile, EOFError, ValueError, SyntaxError, ...
            raise DataError(f"{path}: array {key!r} cannot be read: {error}") from None


def _map_member(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    """Memory-map an npy file that lies uncompressed inside a zip archive."""
    with open_regular(path) as file:
        file.seek(member_start(file, info))
        shape, fortran, dtype = read_npy_header(file, info.file_size)
        if 0 in shape:
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def _unpack_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """An npy file that lies compressed inside a zip archive, in memory."""
    if info.file_size > BOMB_SIZE and info.file_size > BOMB_RATIO * info.compress_size:
        raise ValueError(f"it unpacks to {info.file_size / MIB:,.0f} MiB from {info.compress_size / MIB:,.2f}: above "
                         f"{BOMB_SIZE // MIB} MiB, arrays that shrink more than {BOMB_RATIO} times are refused")
    with archive.open(info) as member:
        shape, fortran, dtype = read_npy_header(member, info.file_size)
        content = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
        view, done = memoryview(content), 0
        while done < len(content):
            count = member.readinto(view[done:done + (16 << 20)])
            if not count:
                raise ValueError("it is truncated")
            done += count
        member.read(1)                                     # at its end the checksum is compared
    return content.view(dtype).reshape(shape, order="F" if fortran else "C")
