"""Trees and zip archives of image files, with EDM's ``dataset.json`` labels where they have one."""

import hashlib
import json
import logging
import os
import stat
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from datasets.handles import PerProcess
from datasets.images import SUFFIXES, UnreadableImage, decode
from utils.errors import DataError

log = logging.getLogger(__name__)
LABELS = "dataset.json"


class ImageFiles:
    """The images of a folder (any depth) or of a zip archive, sorted by name.

    Args:
        path: The folder or archive; not opened before it is asked for something.
        channels: What ``read`` returns: 1 (grey) or 3 (RGB).
        strict: ``read`` refuses files with another number of channels instead of converting them.

    Safe in worker processes: handles are opened lazily, once in each process, and never pickled.
    """

    parallel = True                                        # decoding pays for worker processes

    def __init__(self, path: str | Path, channels: int = 3, strict: bool = False):
        self.path, self.channels, self.strict = Path(path), channels, strict
        self.container = _Folder(self.path) if self.path.is_dir() else _Zip(self.path)

    @cached_property
    def _listing(self) -> tuple[list[str], int]:
        names, ignored = [], 0
        for name in self.container.listing():
            if name == LABELS:
                continue
            visible = not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
            if visible and name.lower().endswith(SUFFIXES):
                names.append(name)
            else:
                ignored += 1
        if ignored:
            log.info("%s: %d images; %d other files are ignored", self.path, len(names), ignored)
        return sorted(names), ignored

    @property
    def names(self) -> list[str]:
        """Sorted paths inside the folder or archive, with forward slashes."""
        return self._listing[0]

    @property
    def ignored(self) -> int:
        """Number of hidden files and files that are no images."""
        return self._listing[1]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        """How image ``i`` is called in messages."""
        return f"{self.path}/{self.names[i]}"

    def read(self, i: int) -> np.ndarray:
        """Pixels of image ``i``: uint8, (H, W, channels). Raises DataError naming the file."""
        return decode(self.container.read(self.names[i]), self.name(i), self.channels, self.strict)

    @cached_property
    def labels(self) -> np.ndarray:
        """int64, (N,): from ``dataset.json``, -1 where there is none."""
        return read_labels(self.container.read(LABELS), f"{self.path}/{LABELS}", self.names) \
            if self.container.has(LABELS) else np.full(len(self), -1, np.int64)

    def stamp(self) -> str:
        """Changes with any file's name, size or modification time."""
        return self.container.stamp(self)


class _Folder:
    def __init__(self, path: Path):
        self.path = path

    def listing(self) -> Iterator[str]:
        """All files, following links to folders once; folders that start with a dot are not entered."""
        seen, waiting = set(), [""]
        while waiting:
            inside = waiting.pop()
            try:
                info = os.stat(self.path / inside)
                if (info.st_dev, info.st_ino) in seen:
                    continue
                seen.add((info.st_dev, info.st_ino))
                with os.scandir(self.path / inside) as entries:
                    for entry in entries:
                        name = f"{inside}{entry.name}"
                        if not entry.is_dir():
                            yield name
                        elif not entry.name.startswith("."):
                            waiting.append(name + "/")
            except OSError as error:
                raise DataError(f"{self.path / inside}: cannot be listed: {error.strerror}") from None

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def read(self, name: str) -> bytes:
        try:
            with open(f"{self.path}/{name}", "rb") as file:
                return file.read()
        except OSError as error:
            raise DataError(f"{self.path / name}: cannot be read: {error.strerror}") from None

    def stamp(self, files: ImageFiles) -> str:
        digest = hashlib.sha256()
        for name in [*files.names, LABELS] if self.has(LABELS) else files.names:
            digest.update(file_stamp(self.path / name).encode())
        return digest.hexdigest()


def open_zip(path: Path) -> zipfile.ZipFile:
    """Raises DataError: it cannot be read, or is no zip archive of a version that Python knows (its RuntimeError)."""
    try:
        return zipfile.ZipFile(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (zipfile.BadZipFile, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: not a usable zip archive: {error}") from None


class _Zip(PerProcess):
    def __init__(self, path: Path):
        self.path = path

    def _open(self) -> zipfile.ZipFile:
        archive = open_zip(self.path)
        for info in archive.infolist():
            inside = PurePosixPath(info.filename.replace("\\", "/"))
            if inside.is_absolute() or ".." in inside.parts or ":" in "".join(inside.parts[:1]):
                raise DataError(f"{self.path}: refused, it holds a name that leaves its folder: {info.filename!r}")
        return archive

    def listing(self) -> list[str]:
        names = [info.filename for info in self.handle.infolist() if not info.is_dir()]
        if len(set(names)) < len(names):
            raise DataError(f"{self.path}: holds two files of the same name")
        return names

    def has(self, name: str) -> bool:
        return name in self.handle.NameToInfo

    def read(self, name: str) -> bytes:
        try:
            return self.handle.read(name)
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError) as error:
            raise UnreadableImage(f"{self.path}/{name}: unreadable in the archive: {error}") from None

    def stamp(self, files: ImageFiles) -> str:
        return file_stamp(self.path)                       # of the archive: its 50,000 names need not be listed


def read_labels(text: bytes, where: str, names: list[str]) -> np.ndarray:
    """Labels of ``names`` from the text of a ``dataset.json``: ``{"labels": [["00000/img.png", 6], ...] or null}``.

    Returns:
        int64, (N,); -1 for all where labels are null or vectors instead of numbers.

    Raises:
        DataError: Not of that form, or the labelled names are not exactly ``names``.
    """
    try:
        entries = json.loads(text)["labels"]
        labels = {str(name).replace("\\", "/"): label for name, label in entries or ()}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f'{where}: must be {{"labels": [[name, number], ...]}}') from None
    if not labels:
        return np.full(len(names), -1, np.int64)
    if odd := set(names) ^ set(labels):
        problem = "labels an image that is not there," if min(odd) in labels else "has no label for"
        raise DataError(f"{where}: {problem} {min(odd)} ({len(odd)} names disagree)")
    if any(type(label) is not int or label < 0 for label in labels.values()):
        return np.full(len(names), -1, np.int64)
    return np.array([labels[name] for name in names], np.int64)


def file_stamp(path: Path) -> str:
    """Path, size and modification time of one file, for fingerprints."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(info.st_mode):
        raise DataError(f"{path}: is not a file")
    return f"{path}:{info.st_size}:{info.st_mtime_ns};"
