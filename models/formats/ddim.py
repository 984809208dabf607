"""Checkpoints of DDIM and SA-DPM, whose network has the names of ours."""

from pathlib import Path

from torch import Tensor

from models.formats.common import StoredWeights, bare, count
from utils.errors import DataError, UserError


def read_sa_dpm(path: Path, content: dict, ema: bool) -> StoredWeights:
    """``{"model_dict", "epoch", ..., OPTIMIZER: {"state": {parameter index: {"ema", ...}}, "param_groups"}}``

    The indices count the parameters in ``named_parameters()`` order, which is that of the state dict: no buffers.
    """
    state = bare(content["model_dict"], path, 'entry "model_dict"')
    step, epoch = count(content.get("global_step", content.get("step"))), count(content.get("epoch"))
    averages = sa_dpm_averages(content)
    if not ema or not averages:
        return StoredWeights(state, "raw", step, epoch)
    if averages.keys() != set(range(len(state))) or any(
            averages[i].shape != tensor.shape for i, tensor in enumerate(state.values())):
        raise DataError(f"{path}: its {len(averages)} averaged tensors do not match its {len(state)} parameters")
    return StoredWeights({name: averages[i] for i, name in enumerate(state)}, "ema", step, epoch)


def sa_dpm_averages(content: dict) -> dict[int, Tensor]:
    """``{parameter index: average}`` from the optimizer's state, under whatever key of the file that lies."""
    states = [value["state"] for value in content.values() if isinstance(value, dict) and "state" in value]
    return {index: slots["ema"] for state in states if isinstance(state, dict) for index, slots in state.items()
            if isinstance(slots, dict) and isinstance(slots.get("ema"), Tensor)}


def read_ddim(path: Path, content: list, ema: bool) -> StoredWeights:
    """``[model, optimizer, epoch, step]`` and, when DDIM trained with EMA, ``ema``."""
    if ema and len(content) == 4:
        raise UserError(f"{path}: a DDIM checkpoint saved without EMA weights; ask for the raw ones (--no-model_ema)")
    kind, index = ("ema", 4) if ema else ("raw", 0)
    return StoredWeights(bare(content[index], path, f"entry {index}"), kind, count(content[3]), count(content[2]))
