"""Read pickles, arrays and torch files from strangers without executing anything that they contain."""

import argparse
import io
import math
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils.errors import DataError
from utils.files import MIB, open_regular, read_regular
from utils.numpy_pickle import NumpyUnpickler, check_opcodes

PICKLE_LIMIT = 256 * MIB                     # CIFAR-10's batches have 31 MB, statistics of 2,048 features 34 MB
DATA_PICKLE_LIMIT = 64 * MIB                 # of a torch file: names and shapes, the tensors lie beside it
NPY_MAGIC = b"\x93NUMPY"
# What tensors, plain values and SA-DPM's Namespace are made of. torch admits more, and calls it as the file says.
_TORCH_GLOBALS = re.compile(
    r"torch (\w+Storage|Size|device|b?float\d*|double|half|u?int\d+|long|bool|complex\d+|float8_\w+|Tensor)"
    r"|torch\.storage (UntypedStorage|TypedStorage)|torch\._utils _rebuild_(tensor(_v[23])?|parameter)"
    r"|torch\.nn\.parameter Parameter|torch\.serialization _get_layout"
    r"|torch\._utils _rebuild_sparse_tensor"
    r"|collections (OrderedDict|Counter|defaultdict)|argparse Namespace|_codecs encode"
    r"|(builtins|__builtin__) (set|bytearray|dict|complex)")
_LEGACY_PICKLES = 5                          # magic number, protocol, machine, content, keys of the storages


def load_pickle(path: str | Path, encoding: str = "bytes"):
    """Unpickle plain containers, numbers, strings and numeric arrays (read-only); nothing else.

    Args:
        path: The file. A ``.npy`` file that wraps a pickled object gives that object.
        encoding: For pickles of Python 2, see ``pickle.load``.

    Raises:
        DataError: The file asks for any other type, is truncated, is no pickle, or larger than 256 MiB.
    """
    file = io.BytesIO(read_regular(path, PICKLE_LIMIT, "pickle"))
    try:
        wrapped = file.getbuffer()[:6] == NPY_MAGIC
        if wrapped:
            _, _, dtype = _npy_header(file)
            if dtype != np.dtype("O"):
                raise pickle.UnpicklingError("it holds an array, not a pickled object")
        start = file.tell()
        check_opcodes(file)
        file.seek(start)
        content = NumpyUnpickler(file, encoding=encoding).load()
        return content[0] if wrapped and isinstance(content, list) and len(content) == 1 else content
    except Exception as error:                # a broken pickle raises anything: IndexError, KeyError, TypeError, ...
        raise DataError(f"{path}: not loaded, only arrays and plain values are: {error}") from None


def read_npy_header(file: BinaryIO, available: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of an ``npy`` array; ``file`` is left at its first number.

    Args:
        file: At the beginning of the array's file or archive member.
        available: Bytes of it, header included.

    Raises:
        ValueError: No npy header, numbers of another kind than b, i, u, f, c, or more of them than there are bytes.
    """
    start = file.tell()
    shape, fortran, dtype = _npy_header(file)
    if dtype.hasobject:
        raise ValueError("it is a pickled object")
    if dtype.kind not in "biufcU" or dtype.names or dtype.subdtype:
        raise ValueError(f"it holds {dtype}, not plain numbers")
    if len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise ValueError(f"it claims the shape {str(shape)[:80]}")
    needed = math.prod(shape) * dtype.itemsize
    if file.tell() - start + needed > available:
        raise ValueError(f"it is truncated: it claims {needed:,} bytes and has {available:,}")
    return shape, fortran, dtype


def map_npy(path: str | Path) -> np.ndarray:
    """A memory-mapped, read-only array of plain numbers from an ``npy`` file.

    Raises:
        DataError: No such file, or not of that form.
    """
    with open_regular(path) as file:
        try:
            shape, fortran, dtype = read_npy_header(file, os.fstat(file.fileno()).st_size)
            if 0 in shape:
                return np.zeros(shape, dtype)
            return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")
        except Exception as error:            # ValueError, SyntaxError, EOFError, OSError, ...
            raise DataError(f"{path}: not a usable npy file: {error}") from None


def _npy_header(file: BinaryIO):
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"it has npy version {version[0]}.{version[1]}, known: 1.0 and 2.0")
    return readers[version](file)


def member_start(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Where the bytes of an archive's member begin. Its local header ends in two lengths, name and "extra" follow.

    Raises:
        ValueError: The file ends before.
    """
    file.seek(member.header_offset + 26)
    lengths = file.read(4)
    if len(lengths) < 4:
        raise ValueError("it is truncated")
    return member.header_offset + 30 + sum(struct.unpack("<HH", lengths))


def load_torch(path: str | Path, map_location="cpu"):
    """``torch.load`` of tensors and plain values (and the ``argparse.Namespace`` that SA-DPM saves), never of code.

    Every part of a file in torch's zip format is compared with its CRC-32, so that a flipped bit is found.

    Raises:
        DataError: Anything else in the file, or a file that is missing, truncated, damaged or no torch file.
    """
    import torch

    with open_regular(path) as file:
        try:
            if zipfile.is_zipfile(file):
                _check_zip(file)
            else:
                _check_legacy(file)
            file.seek(0)
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(file, map_location=map_location, weights_only=True)
            _check_tensors(content)
            return content
        except Exception as error:            # torch wraps nothing: RuntimeError, UnpicklingError, EOFError, ...
            raise DataError(f"{path}: not loaded, only tensors and plain values are: {_reason(error, file)}") from None


class _Damaged(Exception):
    """What is wrong with a torch file, in words."""


def _check_zip(file: BinaryIO) -> None:
    """Sizes, checksums and the opcodes of the pickle in a file of torch's zip format."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise _Damaged("it is compressed, which torch's files never are")
        if sum(member.file_size for member in members) > file.seek(0, io.SEEK_END):
            raise _Damaged("it claims more content than it has bytes")
        if any(member.CRC for member in members):             # all zero: written with torch's checksums switched off
            try:
                damaged = archive.testzip()
            except Exception as error:                        # BadZipFile, EOFError, ...
                raise _Damaged(f"it is damaged: {error}") from None
            if damaged:
                raise _Damaged(f"it is damaged: the CRC-32 of {damaged} is another; copy or download it again")
        for member in members:
            if member.filename.endswith("/data.pkl"):
                if member.file_size > DATA_PICKLE_LIMIT:
                    raise _Damaged(f"its {member.filename} has {member.file_size / MIB:,.0f} MiB, at most "
                                   f"{DATA_PICKLE_LIMIT // MIB} are read")
                file.seek(member_start(file, member))
                _check_torch_pickle(io.BytesIO(file.read(member.file_size)))


def _check_legacy(file: BinaryIO) -> None:
    """The opcodes of the pickles with which a file of torch before 1.6 begins."""
    file.seek(0)
    head = io.BytesIO(file.read(DATA_PICKLE_LIMIT))
    if not head.getvalue().startswith(b"\x80"):
        raise pickle.UnpicklingError("no pickle of torch")
    for _ in range(_LEGACY_PICKLES):
        _check_torch_pickle(head)


def _check_torch_pickle(file: BinaryIO) -> None:
    try:
        check_opcodes(file, allowed=("EMPTY_SET",), globals_=_TORCH_GLOBALS)
    except pickle.UnpicklingError as error:
        if "no pickle" in str(error):                         # a text, a page: _what_it_is knows more
            raise
        raise _Damaged(str(error)) from None


def _check_tensors(content) -> None:
    """Refuse tensors with more numbers than their storage: strides of zero make terabytes of one number."""
    import torch

    ahead, seen = [content], set()
    while ahead:
        value = ahead.pop()
        if isinstance(value, torch.Tensor):
            if value.layout == torch.strided and not value.is_meta:
                held = value.untyped_storage().nbytes() // value.element_size()
                if value.numel() > held:
                    raise _Damaged(f"it has a tensor of {value.numel():,} numbers of which it holds {held:,}")
            continue
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        if isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))                               # a list may hold itself
            ahead += value.values() if isinstance(value, dict) else value


def _reason(error: Exception, file: BinaryIO) -> str:
    if isinstance(error, _Damaged):
        return str(error)
    refused = re.search(r"(?i)unsupported (?:global|class):? (?:GLOBAL )?(\S+)", str(error))
    return f"it asks for {refused[1]}" if refused else _what_it_is(file)


def _what_it_is(file: BinaryIO) -> str:
    """Why a file is no torch file, as far as its beginning tells."""
    try:
        file.seek(0)
        head = file.read(512).lstrip().lower()
    except (OSError, ValueError):
        head = b""
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself; fetch it with: git lfs pull"
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page, not weights; the download gave a page (of a login, or an error) instead of the file"
    if not head:
        return "it is empty"
    return "it is truncated, or no torch file"
