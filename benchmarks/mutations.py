"""Damage to files: bits, numbers, pieces and words, in archives also under a right checksum."""

import io
import os
import random
import struct
import zipfile
from pathlib import Path

NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
WORDS = [b"null", b"true", b"nan", b"-1", b"1e400", b"1" * 40, b"9" * 5000, b"[]", b"{}", b"[[[[[[", b"\"", b"'", b"\0",
         b"\n", b"../../outside/precious", b"/dev/zero", b"&a [*a]", b"*a", b"<<: ", b"!!python/object:os.system",
         b"\xff\xfe", b"\xed\xa0\x80"]
# Opcodes and names that mean something to an unpickler.
PIECES = [b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"cnumpy._core.multiarray\nscalar\n", b"R", b"b", b"\x81", b"\x85",
          b"\x86", b"\x87", b"(", b"t", b")", b"N", b"K\x00", b"VO8\n", b"C\x08AAAAAAAA", b"0", b"2", b"h\x00",
          b"h\x01", b"q\x00", b"r\xff\xff\xff\x7f", b"}", b"]", b"s", b"u", b"a", b"e", b"J\xff\xff\xff\xff",
          b"G\x7f\xf8\0\0\0\0\0\0", b"."]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """``content`` with one to four kinds of damage."""
    result = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(DAMAGES)(result, rng)
    return bytes(result)


def _flip(data: bytearray, rng) -> None:
    for _ in range(rng.choice((1, 1, 8))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _byte(data, rng) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _number(data, rng) -> None:
    kind = rng.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
    size = struct.calcsize(kind)
    if len(data) >= size:
        at = rng.randrange(len(data) - size + 1)
        data[at:at + size] = struct.pack(kind, rng.choice(NUMBERS) % 2**(8 * size))


def _cut(data, rng) -> None:
    del data[rng.randrange(len(data) + 1):]


def _remove(data, rng) -> None:
    at = rng.randrange(len(data) + 1)
    del data[at:at + rng.choice((1, 2, 8, 64))]


def _repeat(data, rng) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = data[at:at + rng.choice((1, 8, 64))] * rng.choice((1, 2, 100))


def _insert(data, rng) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice((*WORDS, *PIECES))


def _overwrite(data, rng) -> None:
    at, piece = rng.randrange(len(data) + 1), rng.choice((*WORDS, *PIECES))
    data[at:at + len(piece)] = piece


def _value(data, rng) -> None:
    """A word of a text becomes another."""
    words = bytes(data).split(b" ") if len(data) < 100_000 else []
    if len(words) > 1:
        words[rng.randrange(len(words))] = rng.choice(WORDS)
        data[:] = b" ".join(words)


DAMAGES = [_flip, _flip, _byte, _number, _number, _cut, _remove, _repeat, _insert, _overwrite, _value]


def mutate_zip(content: bytes, rng: random.Random) -> bytes:
    """Damage one member of an archive and write it again, so that sizes and checksums are right."""
    out = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(out, "w") as made:
            members = archive.infolist()
            victim = rng.choice(members)
            for info in members:
                data = archive.read(info)
                made.writestr(zipfile.ZipInfo(info.filename), mutate(data, rng) if info is victim else data,
                              rng.choice((zipfile.ZIP_STORED, info.compress_type)))
    except (zipfile.BadZipFile, IndexError, ValueError):
        return mutate(content, rng)
    return out.getvalue()


def mutate_files(names: list[str], folder: Path, rng: random.Random) -> None:
    """Damage one of the files ``names`` below ``folder``; now and then it is missing, a folder, a pipe or a link."""
    if not names:
        return
    path = folder / rng.choice(names)
    if rng.random() < 0.03:
        path.unlink()
        odd = rng.choice(("missing", "folder", "pipe", "zero", "itself"))
        if odd == "folder":
            path.mkdir()
        elif odd == "pipe":
            os.mkfifo(path)
        elif odd != "missing":
            path.symlink_to("/dev/zero" if odd == "zero" else path.name)
        return
    content = path.read_bytes()
    inside = zipfile.is_zipfile(path) and rng.random() < 0.6
    path.write_bytes(mutate_zip(content, rng) if inside else mutate(content, rng))
