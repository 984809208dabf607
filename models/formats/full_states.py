"""Full training states of DDIM, SA-DPM and this program, in one form: what another run can go on from."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.formats.common import State, bare, count
from models.formats.ddim import is_ddim, is_sa_dpm, sa_dpm_averages
from models.formats.ours import is_ours
from utils.errors import DataError


@dataclass(frozen=True)
class FullState:
    """A training state by names of weights, which every program has alike.

    Attributes:
        program: "sa-ddim", "sa-dpm" or "ddim".
        weights, averages: Raw and averaged weights; averages None where the run kept none.
        moments: What the optimizer keeps for each weight: exp_avg, exp_avg_sq, step, ...; empty where nothing is.
        step, epoch: As the file counts them; epoch None where it does not say.
    """

    program: str
    weights: State
    averages: State | None
    moments: dict[str, dict]
    step: int
    epoch: int | None


def read_full_state(path: Path, content) -> FullState:
    """
    Args:
        path: For messages.
        content: What ``load_torch`` gave.

    Raises:
        DataError: No full state in a known form, or one whose parts do not belong together.
    """
    for recognises, read in READERS:
        if recognises(content):
            return read(path, content)
    raise DataError(f"{path}: holds no full training state of this program, DDIM or SA-DPM, such as ckpt.pth: nothing "
                    "to resume from; weights alone can be started from with --init_from, in another --doc")


def _read_ours(path: Path, content: dict) -> FullState:
    weights = bare(content["model"], path, 'entry "model"')
    averages = bare(content["ema"], path, 'entry "ema"') if content.get("ema") else None
    moments = _moments(path, content.get("optimizer"), list(weights))
    return FullState("sa-ddim", weights, averages, moments, _step(path, content.get("step"), moments),
                     count(content.get("epoch")))


def _read_sa_dpm(path: Path, content: dict) -> FullState:
    """The optimizer's state, under whatever key, also holds the averages."""
    weights = bare(content["model_dict"], path, 'entry "model_dict"')
    averages = sa_dpm_averages(path, content, weights)
    stored = next((value for value in content.values() if isinstance(value, dict)
                   and {"state", "param_groups"} <= value.keys()), None)
    moments = _moments(path, stored, list(weights))
    step = _step(path, content.get("global_step", content.get("step")), moments)
    return FullState("sa-dpm", weights, averages, moments, step, count(content.get("epoch")))


def _read_ddim(path: Path, content: list) -> FullState:
    weights = bare(content[0], path, "entry 0")
    averages = bare(content[4], path, "entry 4") if len(content) == 5 else None
    moments = _moments(path, content[1], list(weights))
    return FullState("ddim", weights, averages, moments, _step(path, content[3], moments), count(content[2]))


READERS = ((is_ours, _read_ours), (is_sa_dpm, _read_sa_dpm), (is_ddim, _read_ddim))


def _moments(path: Path, optimizer, names: list[str]) -> dict[str, dict]:
    """By names; an optimizer counts weights in the order of the state dict, in which these networks have no buffers."""
    if optimizer is None:
        return {}
    slots = optimizer.get("state") if isinstance(optimizer, dict) else None
    if not isinstance(slots, dict) or not all(type(i) is int and 0 <= i < len(names) and isinstance(each, dict)
                                              for i, each in slots.items()):
        raise DataError(f"{path}: its optimizer's state does not match its {len(names)} weights")
    return {names[i]: {key: _as_tensor(key, value) for key, value in each.items() if key != "ema"}
            for i, each in slots.items()}


def _as_tensor(key, value):
    """Older torch counts steps in an int."""
    if key == "step" and isinstance(value, (int, float, Tensor)):
        return torch.as_tensor(value, dtype=torch.float32).reshape(())
    return value


def _step(path: Path, stored, moments: dict[str, dict]) -> int:
    """The file's own count, or that of its optimizer."""
    if count(stored) is not None:
        return stored
    steps = [int(each["step"]) for each in moments.values() if isinstance(each.get("step"), Tensor)]
    if not steps:
        raise DataError(f"{path}: says neither how many steps it has done nor what its optimizer keeps")
    return max(steps)
