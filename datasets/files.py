"""Trees and zip archives of image files."""

import hashlib
import logging
import os
import stat
import zipfile
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from datasets.handles import PerProcess
from datasets.images import BYTE_LIMIT, SUFFIXES, UnreadableImage, decode
from datasets.labels import FILE_RULES, LABELS, file_rule, read_labels
from datasets.reader import Reader
from utils.errors import DataError
from utils.files import MIB, open_regular, read_regular

log = logging.getLogger(__name__)


class ImageFiles(Reader):
    """The images of a folder (any depth) or of a zip archive, sorted by name.

    Args:
        path: The folder or archive; not opened before it is asked for something.
        channels: What ``read`` returns: 1 (grey) or 3 (RGB).
        strict: ``read`` refuses files with another number of channels instead of converting them.
        label_rule: Name in ``datasets.labels.FILE_RULES``.

    Safe in worker processes: handles are opened lazily, once in each process, and never pickled.
    """

    def __init__(self, path: str | Path, channels: int = 3, strict: bool = False, label_rule: str = "auto"):
        self.path, self.channels, self.strict, self.label_rule = Path(path), channels, strict, file_rule(label_rule)
        self.container = _Folder(self.path) if self.path.is_dir() else _Zip(self.path)

    @cached_property
    def _listing(self) -> tuple[list[str], list[str]]:
        names, ignored = [], []
        for name in self.container.listing():
            if name == LABELS:
                continue
            visible = not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
            (names if visible and name.lower().endswith(SUFFIXES) else ignored).append(name)
        if ignored:
            log.info("%s: %d images; %d other files are ignored", self.path, len(names), len(ignored))
        return sorted(names), ignored

    @property
    def names(self) -> list[str]:
        """Sorted paths inside the folder or archive, with forward slashes."""
        return self._listing[0]

    @property
    def ignored(self) -> int:
        """Number of hidden files and files that are no images."""
        return len(self._listing[1])

    def contents(self) -> str:
        """What lies there instead of images, by endings."""
        endings = Counter(PurePosixPath(name).suffix.lower() or "no ending" for name in self._listing[1])
        found = ", ".join(f"{count} x {ending}" for ending, count in
                          sorted(endings.items(), key=lambda item: (-item[1], item[0]))[:4])
        return f"{self.path} has {found or 'no files'}; images end in {', '.join(SUFFIXES)}"

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return f"{self.path}/{self.names[i]}"

    def read(self, i: int) -> np.ndarray:
        """Pixels of image ``i``: uint8, (H, W, channels). Raises DataError naming the file."""
        return decode(self.container.read(self.names[i]), self.name(i), self.channels, self.strict)

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 (N,), -1: none; or float32 (N, D): from ``dataset.json`` if the rule takes that, else by the rule."""
        if self.label_rule in ("auto", "json") and self.container.has(LABELS):
            return read_labels(self.container.read(LABELS), f"{self.path}/{LABELS}", self.names)
        return FILE_RULES[self.label_rule](str(self.path), self.names)

    def stamp(self) -> str:
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
            return read_regular(f"{self.path}/{name}", BYTE_LIMIT, "picture")
        except DataError as error:
            raise UnreadableImage(str(error)) from None

    def stamp(self, files: ImageFiles) -> str:
        digest = hashlib.sha256()
        for name in [*files.names, LABELS] if self.has(LABELS) else files.names:
            digest.update(os.fsencode(file_stamp(self.path / name)))
        return digest.hexdigest()


def open_zip(path: Path) -> zipfile.ZipFile:
    """Raises DataError: it cannot be read, or is no zip archive of a version that Python knows (its RuntimeError)."""
    open_regular(path).close()                             # a pipe or a device would never end
    try:
        return zipfile.ZipFile(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:                # BadZipFile, RuntimeError, ValueError, struct.error, OverflowError, ...
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
        names = [info.filename for info in self.handle.infolist() if not info.filename.endswith("/")]
        if len(set(names)) < len(names):
            raise DataError(f"{self.path}: holds two files of the same name")
        return names

    def has(self, name: str) -> bool:
        return name in self.handle.NameToInfo

    def read(self, name: str) -> bytes:
        size = self.handle.NameToInfo[name].file_size
        if size > BYTE_LIMIT:
            raise UnreadableImage(f"{self.path}/{name}: unpacks to {size / MIB:,.1f} MiB: a picture may have "
                                  f"{BYTE_LIMIT // MIB} MiB at most")
        try:
            return self.handle.read(name)
        except Exception as error:            # BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, ...
            raise UnreadableImage(f"{self.path}/{name}: unreadable in the archive: {error}") from None

    def stamp(self, files: ImageFiles) -> str:
        return file_stamp(self.path)                       # of the archive: its 50,000 names need not be listed


def file_stamp(path: Path) -> str:
    """Path, size and modification time of one file, for fingerprints."""
    try:
        info = os.stat(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(info.st_mode):
        raise DataError(f"{path}: is not a file")
    return f"{path}:{info.st_size}:{info.st_mtime_ns};"
