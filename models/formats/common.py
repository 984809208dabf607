"""What the readers of weight files share."""

import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from utils.errors import DataError
from utils.files import open_regular

State = dict[str, Tensor]


@dataclass(frozen=True)
class StoredWeights:
    """One set of weights from a file, by the names of our networks."""

    state: State
    kind: str = "unknown"            # "ema", "raw", or "unknown" where the file does not say
    step: int | None = None
    epoch: int | None = None


def is_state(content) -> bool:
    return isinstance(content, dict) and bool(content) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())


def bare(state, path: Path, what: str) -> State:
    if not is_state(state):
        raise DataError(f"{path}: its {what} is no state dict of tensors")
    return {bare_name(name): tensor for name, tensor in state.items()}


def read_safetensors(path: Path) -> State:
    """All tensors of a safetensors file, which cannot hold code. Raises DataError: broken, or of another kind."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    open_regular(path).close()                       # a pipe or a device would never end
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: not loaded, broken or no safetensors file: {error}") from None


def safetensors_metadata(path: Path) -> dict[str, str]:
    """What is noted in a safetensors file beside its tensors. Raises DataError: broken, or of another kind."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: not loaded, broken or no safetensors file: {error}") from None


def count(value) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def bare_name(name: str) -> str:
    """A parameter's name without what DistributedDataParallel and torch.compile put in front."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", name)
