"""Checkpoints of DDIM and SA-DPM, whose network has the names of ours."""

from pathlib import Path

from torch import Tensor

from models.formats.common import State, StoredWeights, bare, count
from utils.errors import DataError, UserError


def is_sa_dpm(content) -> bool:
    return isinstance(content, dict) and "model_dict" in content


def is_ddim(content) -> bool:
    return isinstance(content, (list, tuple)) and len(content) in (4, 5)


def read_sa_dpm(path: Path, content: dict, ema: bool) -> StoredWeights:
    """``{"model_dict", "epoch", ..., OPTIMIZER: {"state": {parameter index: {"ema", ...}}, "param_groups"}}``

    The indices count the parameters in ``named_parameters()`` order, which is that of the state dict: no buffers.
    """
    state = bare(content["model_dict"], path, 'entry "model_dict"')
    step, epoch = count(content.get("global_step", content.get("step"))), count(content.get("epoch"))
    averages = sa_dpm_averages(path, content, state) if ema else None
    return StoredWeights(averages or state, "ema" if averages else "raw", step, epoch)


def sa_dpm_averages(path: Path, content: dict, weights: State) -> State | None:
    """The averages of ``weights``, which lie in the optimizer's state, under whatever key of the file; None: none.

    Raises:
        DataError: Not one for each, or of another shape.
    """
    states = [value["state"] for value in content.values() if isinstance(value, dict) and "state" in value]
    found = {index: slots["ema"] for state in states if isinstance(state, dict) for index, slots in state.items()
             if isinstance(slots, dict) and isinstance(slots.get("ema"), Tensor)}
    if not found:
        return None
    if found.keys() != set(range(len(weights))) or any(
            found[i].shape != tensor.shape for i, tensor in enumerate(weights.values())):
        raise DataError(f"{path}: its {len(found)} averaged tensors do not match its {len(weights)} parameters")
    return {name: found[i] for i, name in enumerate(weights)}


def read_ddim(path: Path, content: list, ema: bool) -> StoredWeights:
    """``[model, optimizer, epoch, step]`` and, when DDIM trained with EMA, ``ema``."""
    if ema and len(content) == 4:
        raise UserError(f"{path}: a DDIM checkpoint saved without EMA weights; ask for the raw ones (--no-model_ema)")
    kind, index = ("ema", 4) if ema else ("raw", 0)
    return StoredWeights(bare(content[index], path, f"entry {index}"), kind, count(content[3]), count(content[2]))
