"""Read pickles and torch files from strangers without executing anything that they contain."""

import argparse
import pickle
import re
from pathlib import Path

import numpy as np

from utils.errors import DataError

# What numpy arrays, plain containers and argparse.Namespace need; every other global in a pickle is refused.
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy.core.multiarray", "scalar"): np._core.multiarray.scalar,
    ("numpy._core.multiarray", "scalar"): np._core.multiarray.scalar,
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),    # how Python 2 byte strings travel
    ("collections", "OrderedDict"): dict,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_pickle(path: str | Path, encoding: str = "bytes"):
    """Unpickle plain containers, numbers, strings and numpy arrays; nothing else.

    Args:
        path: The file. A ``.npy`` file that wraps a pickled object gives that object.
        encoding: For pickles of Python 2, see ``pickle.load``.

    Raises:
        DataError: The file asks for any other type, is truncated, or is no pickle.
    """
    try:
        with open(path, "rb") as file:
            if file.read(6) == b"\x93NUMPY":
                file.seek(0)
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                if not dtype.hasobject:
                    raise pickle.UnpicklingError("it holds an array, not a pickled object")
                array = _Unpickler(file, encoding=encoding).load()
                return array.item() if shape == () else array
            file.seek(0)
            return _Unpickler(file, encoding=encoding).load()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:                # a broken pickle raises anything: IndexError, KeyError, TypeError, ...
        raise DataError(f"{path}: not loaded, only arrays and plain values are: {error}") from None


def load_torch(path: str | Path, map_location="cpu"):
    """``torch.load`` of tensors and plain values (and the ``argparse.Namespace`` that SA-DPM saves), never of code.

    Raises:
        DataError: Anything else in the file, or a file that is missing, truncated or no torch file.
    """
    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:                # torch wraps nothing: RuntimeError, UnpicklingError, EOFError, ...
        refused = re.search(r"(?i)unsupported (?:global|class):? (?:GLOBAL )?(\S+)", str(error))
        reason = f"it asks for {refused[1]}" if refused else "it is truncated, or no torch file"
        raise DataError(f"{path}: not loaded, only tensors and plain values are: {reason}") from None
