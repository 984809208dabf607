"""Captioned images: folders with ``metadata.jsonl`` (Hugging Face's imagefolder) and tar shards (WebDataset).

    DIR/metadata.jsonl     {"file_name": "sub/001.jpg", "text": "a red square"}, one object a line
    DIR/00000.tar          001.jpg, 001.txt, 002.png, 002.txt, ...: what shares a stem belongs together
"""

import hashlib
import json
import os
import tarfile
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from datasets.files import file_stamp
from datasets.handles import PerProcess
from datasets.images import BYTE_LIMIT, SUFFIXES, UnreadableImage, decode, stored_channels
from datasets.reader import Reader
from utils.errors import DataError
from utils.files import MIB, open_regular, read_regular

METADATA = "metadata.jsonl"
METADATA_LIMIT, LINE_LIMIT = 4096 * MIB, MIB
CAPTION_LIMIT = 10_000                        # characters; text encoders read some hundred


def open_captioned(folder: Path, channels: int):
    """The reader of a folder of either form.

    Raises:
        DataError: Neither; or an entry without a caption, without a file, or out of the folder.
    """
    if (folder / METADATA).is_file():
        return CaptionedFolder(folder, channels)
    shards = sorted(folder.glob("*.tar")) if folder.is_dir() else [folder] if folder.suffix == ".tar" else []
    if not shards:
        raise DataError(f"{folder}: has neither {METADATA} nor tar shards; a captioned data set needs one of them")
    return CaptionedShards(folder, shards, channels)


def _decode(data: bytes, name: str, channels: int) -> np.ndarray:
    pixels = decode(data, name, channels)
    if channels == 3 and stored_channels(data) == 1:
        raise UnreadableImage(f"{name}: a picture of 1 channel, text-to-image models are trained on colours; convert "
                              "it to RGB, or leave it out with data.skip_bad")
    return pixels


def _checked_caption(text, where: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: no caption; every image needs a text")
    if len(text) > CAPTION_LIMIT:
        raise DataError(f"{where}: a caption of {len(text):,} characters; {CAPTION_LIMIT:,} are possible")
    try:
        text.encode()                         # JSON may hold half a character, which no tokenizer takes
    except UnicodeEncodeError:
        raise DataError(f"{where}: no UTF-8 text") from None
    return text.strip()


class _Captioned(Reader):
    """What both forms share: names and captions in one order."""

    path: Path
    channels: int
    entries: list                             # (name, caption, ...)

    @property
    def captions(self) -> list[str]:
        return [entry[1] for entry in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, i: int) -> str:
        return f"{self.path}/{self.entries[i][0]}"

    def contents(self) -> str:
        return f"{self.path} lists no images"

    def _digest(self, files: list[Path]) -> str:
        digest = hashlib.sha256("\0".join(self.captions).encode())
        for file in files:
            digest.update(file_stamp(file).encode(errors="surrogateescape"))
        return digest.hexdigest()


class CaptionedFolder(_Captioned):
    """``metadata.jsonl`` and the files that it names. Further keys of its lines are ignored."""

    def __init__(self, path: Path, channels: int = 3):
        self.path, self.channels = path, channels

    @cached_property
    def entries(self) -> list[tuple[str, str]]:
        """(name, caption), sorted by name. DataError: a line that is wrong, which it names."""
        found = {}
        with open_regular(self.path / METADATA, METADATA_LIMIT, "list of captions") as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_LIMIT + 1), b""), 1):
                where = f"{self.path / METADATA}, line {number}"
                if line.strip():
                    name, caption = self._entry(line, where)
                    if name in found:
                        raise DataError(f"{where}: {name} is there twice")
                    found[name] = caption
        return sorted(found.items())

    def _entry(self, line: bytes, where: str) -> tuple[str, str]:
        try:
            entry = json.loads(line) if len(line) <= LINE_LIMIT else None
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            raise DataError(f'{where}: must be {{"file_name": "001.jpg", "text": "a caption"}}')
        name = PurePosixPath(entry["file_name"])
        if name.is_absolute() or ".." in name.parts:
            raise DataError(f"{where}: {entry['file_name']!r} leaves the folder")
        if not os.path.isfile(self.path / name):               # Path's own raises for a name that is too long
            raise DataError(f"{where}: no such file: {self.path / name}")
        return str(name), _checked_caption(entry.get("text"), where)

    def read(self, i: int) -> np.ndarray:
        try:
            data = read_regular(self.path / self.entries[i][0], BYTE_LIMIT, "picture")
        except DataError as error:
            raise UnreadableImage(str(error)) from None
        return _decode(data, self.name(i), self.channels)

    def stamp(self) -> str:
        return self._digest([self.path / name for name, _ in self.entries])


class CaptionedShards(_Captioned):
    """Uncompressed tar files, of which nothing is unpacked: an image is read where it lies."""

    def __init__(self, path: Path, shards: list[Path], channels: int = 3):
        self.path, self.shards, self.channels = path, shards, channels
        self.files = [_Shard(shard) for shard in shards]

    @cached_property
    def entries(self) -> list[tuple[str, str, int, int, int]]:
        """(name, caption, shard, offset, size) in the order of the shards. DataError: a broken shard, or no text."""
        return [entry for number, shard in enumerate(self.shards) for entry in self._listing(number, shard)]

    def _listing(self, number: int, shard: Path) -> list[tuple]:
        images, texts = {}, {}
        open_regular(shard).close()
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    stem, suffix = member.name.rpartition(".")[::2]
                    if not member.isreg() or PurePosixPath(member.name).name.startswith("."):
                        continue
                    if f".{suffix.lower()}" in SUFFIXES:
                        if stem in images:
                            raise DataError(f"{shard}/{stem}: {images[stem].name} and {member.name} share its text; "
                                            "name each image otherwise")
                        images[stem] = member
                    elif suffix == "txt":
                        texts[stem] = archive.extractfile(member).read(LINE_LIMIT)
        except DataError:
            raise
        except Exception as error:            # TarError, OSError, EOFError, ValueError, RecursionError, ...
            raise DataError(f"{shard}: not a whole, uncompressed tar file: {error}") from None
        return [(f"{shard.name}/{member.name}", self._text(shard, stem, texts), number, member.offset_data, member.size)
                for stem, member in images.items()]

    def _text(self, shard: Path, stem: str, texts: dict) -> str:
        where = f"{shard}/{stem}.txt"
        if stem not in texts:
            raise DataError(f"{where}: missing; every image needs a text")
        return _checked_caption(texts[stem].decode(errors="surrogateescape"), where)

    def read(self, i: int) -> np.ndarray:
        _, _, shard, offset, size = self.entries[i]
        if size > BYTE_LIMIT:
            raise UnreadableImage(f"{self.name(i)}: {size / MIB:,.1f} MiB: a picture may have {BYTE_LIMIT // MIB} MiB "
                                  "at most")
        file = self.files[shard].handle
        file.seek(offset)
        return _decode(file.read(size), self.name(i), self.channels)

    def stamp(self) -> str:
        return self._digest(self.shards)


class _Shard(PerProcess):
    def __init__(self, path: Path):
        self.path = path

    def _open(self):
        return open_regular(self.path)
