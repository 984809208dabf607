"""Full states, judged before anything of them is used: whole, of this network and optimizer, of these images.

A moment of another shape would reach the fused kernels, which read and write as many numbers as the weight has.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.schema import Config
from functions.schedule import make_schedule
from functions.timesteps import TimeSampler
from models.trained import frozen
from models.trained import trained as trained_part
from models.weights import weights_fingerprint
from runners.network import AMP
from runners.training.adopting import adopt, is_ours
from runners.training.optimizer import MOMENTS, OPTIONAL_MOMENTS
from utils.errors import DataError, UserError
from utils.safe_load import load_torch

log = logging.getLogger(__name__)
SHOWN = 3                                            # problems that a message names
SAMPLED = 64                                         # images that stand for a data set


def _count(value) -> bool:
    return type(value) is int and value >= 0


def _number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _sums(value) -> bool:
    return isinstance(value, list) and all(isinstance(rank, list) and all(map(_number, rank)) for rank in value)


def _best(value) -> bool:
    return isinstance(value, dict) and _number(value.get("fid")) and _count(value.get("step")) and (
        value.get("snapshot") is None or _count(value["snapshot"]))


def _schedule(value) -> bool:
    return isinstance(value, dict) and _count(value.get("last_epoch"))


def _scaler(value) -> bool:
    keys = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
    return isinstance(value, dict) and (not value or value.keys() == keys) and all(map(_number, value.values()))


def _sections(value) -> bool:
    return isinstance(value, dict) and all(isinstance(section, dict) for section in value.values())


def _text(value) -> bool:
    return isinstance(value, str)


def _counts(value) -> bool:
    return isinstance(value, list) and all(map(_count, value))


def _texts(value) -> bool:
    return isinstance(value, list) and all(map(_text, value))


# What is no tensor: key -> (test, whether it may be absent or None).
PLAIN: dict[str, tuple[Callable, bool]] = {
    "step": (_count, False), "epoch": (_count, False), "ema_updates": (_count, False), "bad_run": (_count, False),
    "lr_schedule": (_schedule, False), "grad_scaler": (_scaler, False), "best_fid": (_best, True),
    "metric_sums": (_sums, True), "snapshots": (_counts, True), "config": (_sections, True),
    "amp": (lambda value: isinstance(value, str) and value in AMP, True), "data_fingerprint": (_text, True),
    "data_content": (_text, True), "frozen": (_text, True), "global_batch": (_count, True),
    "digests": (lambda value: isinstance(value, dict), True), "averages": (_texts, True),
}


class Judge:
    """What a full state must be for a run to go on from it: ``judge(state, path)``.

    Args:
        model: The bare network.
        config: Of the run.
        images: ImageStore of the training images; None: any will do.
        force: Go on although the state was trained on other images.
    """

    def __init__(self, model: nn.Module, config: Config, images=None, force: bool = False):
        self.model, self.config, self.force = model, config, force
        self.data = identity(model, images) if images is not None else {}

    def __call__(self, content, path: Path) -> dict:
        """The full state in a file's content, in this program's form whatever program wrote it.

        Raises:
            DataError: One line that names what is missing, too much, of another shape or type, or not finite.
            UserError: It was trained on other images, or its adapters on other frozen weights.
        """
        state = content if is_ours(content) else adopt(content, path, self.model, self.config)
        refuse(path, list(problems(state, self.model, self.config)))
        refuse(path, list(_other_digests(state)))
        self._check_frozen(state, path)
        self._check_data(state, path)
        return state

    def _check_frozen(self, state: dict, path: Path) -> None:
        """Adapters mean something beside the weights only that they were trained with."""
        stored, mine = state.get("frozen"), self.data.get("frozen")
        if stored is None or mine is None or stored == mine:
            return
        if not self.force:
            raise UserError(f"{path} has trained adapters of other weights ({stored}, model.pretrained "
                            f"{self.config.model.pretrained} has {mine}); give the same, or --force to go on with "
                            "these")
        log.warning("resuming adapters on other weights than those of %s, because of --force", path)

    def _check_data(self, state: dict, path: Path) -> None:
        """Files that were only copied or touched have another fingerprint and the same content."""
        stored, mine = (({key: where.get(key) for key in ("data_fingerprint", "data_content")})
                        for where in (state, self.data))
        if not self.data or stored["data_fingerprint"] in (None, mine["data_fingerprint"]):
            return
        held_out = (state.get("config") or {}).get("data", {}).get("validation_fraction")
        if stored["data_content"] == mine["data_content"]:
            log.info("the images lie elsewhere or have another date than in %s, their content is the same", path)
        elif held_out not in (None, self.config.data.validation_fraction):
            log.warning("resuming on another part of the images: data.validation_fraction was %s, is %s", held_out,
                        self.config.data.validation_fraction)
        elif self.force:
            log.warning("resuming on other images than those of %s, because of --force", path)
        else:
            raise UserError(f"{path} was trained on other images (content {stored['data_content']}, here "
                            f"{mine['data_content']}); give the same data set, or --force to go on with these")


def inherit(path: Path, model: nn.Module, config: Config) -> dict:
    """The full state with which a new run begins at step 0: weights, average and moments of another run.

    Args:
        path: A full state of this program, SA-DPM or DDIM.

    Raises:
        UserError: No full state there. DataError: A broken one, or one of another network or optimizer.
    """
    state = adopt(load_torch(path), path, model, config)
    log.info("starting from %s", state["adopted"])
    if not state["optimizer"]["state"]:
        raise UserError(f"--keep_optimizer: {path} holds no moments; leave the flag out")
    refuse(path, list(problems(state, model, config)))
    return state | {"step": 0, "epoch": 0, "lr_schedule": {"last_epoch": 0}}


def identity(model: nn.Module, images) -> dict[str, str]:
    """What a full state keeps of its images, the fingerprint of their files and 16 digits of their content, and of
    frozen weights.

    The content stands for the number of images, all labels, and SAMPLED images spread over the set.
    """
    rows = torch.linspace(0, images.num_images - 1, min(SAMPLED, images.num_images)).long()
    digest = hashlib.sha256(f"{images.num_images} {images.labels.tolist()}".encode())
    for batch in images.batches([rows]):
        digest.update(batch.cpu().contiguous().numpy())
    found = {"data_fingerprint": images.fingerprint, "data_content": digest.hexdigest()[:16]}
    rest = frozen(model)
    return found | {"frozen": weights_fingerprint(rest)} if rest else found


def refuse(path: Path, found: list[str]) -> None:
    """DataError if there are problems; names the first ones."""
    if found:
        more = f" (and {len(found) - SHOWN} more)" if len(found) > SHOWN else ""
        raise DataError(f"{path}: no state that this run can go on from: {'; '.join(found[:SHOWN])}{more}")


def problems(state: dict, model: nn.Module, config: Config) -> Iterator[str]:
    """All that is wrong with a full state, in words; nothing of it has been used yet."""
    for key, (is_right, optional) in PLAIN.items():
        if state.get(key) is None and not optional:
            yield f"{key} is missing"
        elif state.get(key) is not None and not is_right(state[key]):
            yield f"{key} is {_short(state[key])}"
    own = trained_part(model)
    yield from _tensors("weight", state.get("model"), own)
    if state.get("ema") is not None:
        yield from _tensors("averaged weight", state["ema"], own)
    more = state.get("more_averages", {})
    if not isinstance(more, dict):
        yield f"more_averages is {_short(more)}"
    else:
        for name, average in more.items():
            yield from _tensors(f"weight of the average {name!r},", average, own)
    yield from _times(state.get("times") or {}, config)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield from _optimizer(state.get("optimizer"), trained, config)


def _times(stored, config: Config) -> Iterator[str]:
    """Of a sampler of times that learns from losses; empty where the run drew otherwise so far."""
    own = TimeSampler.of(config, make_schedule(config.diffusion)).state_dict()
    if not isinstance(stored, dict):
        yield f"times is {_short(stored)}"
    elif stored and own:
        found = list(_tensors("entry of times", stored, own))
        counts, length = stored.get("counts"), own["losses"].shape[1]
        if not found and not 0 <= int(counts.min()) <= int(counts.max()) <= length:
            found = [f"entry of times counts is not in [0, {length}]"]
        yield from found


def _tensors(kind: str, stored, own: dict[str, Tensor]) -> Iterator[str]:
    if not isinstance(stored, dict):
        yield f"it has no {kind}s but {_short(stored)}"
        return
    yield from (f"{kind} {name} is missing" for name in own if name not in stored)
    yield from (f"{kind} {_short(name)} is not of this network" for name in stored if name not in own)
    for name, tensor in own.items():
        flaw = _flaw(stored[name], tensor.shape, tensor.dtype) if name in stored else None
        if flaw:
            yield f"{kind} {name} {flaw}"


def _optimizer(stored, parameters: dict[str, nn.Parameter], config: Config) -> Iterator[str]:
    if not isinstance(stored, dict) or not isinstance(stored.get("state"), dict):
        yield f"optimizer is {_short(stored)}"
        return
    slots, name = stored["state"], config.optim.optimizer
    if not slots:                                    # no step has been taken, or the optimizer keeps nothing
        return
    yield from (f"optimizer state {_short(index)} belongs to no weight" for index in slots
                if type(index) is not int or not 0 <= index < len(parameters))
    for index, (parameter_name, parameter) in enumerate(parameters.items()):
        shapes = MOMENTS[name](config.optim, parameter.shape)
        if not isinstance(slots.get(index), dict):
            yield f"optimizer state of {parameter_name} is missing"
        else:
            yield from _moments(slots[index], shapes, OPTIONAL_MOMENTS.get(name, ()), parameter_name, parameter.dtype)


def _moments(stored: dict, shapes: dict, optional, name: str, dtype: torch.dtype) -> Iterator[str]:
    yield from (f"{key} of {name} is missing" for key in shapes if key not in stored and key not in optional)
    for key, value in stored.items():
        if key not in shapes:
            yield f"{_short(key)} of {name} is no moment of this optimizer"
        elif key == "step" and "RMS" in shapes and type(value) is int:   # Adafactor counts in a plain number
            yield from [f"step of {name} is negative"] * (value < 0)
        elif not (value is None and key in optional):
            flaw = _flaw(value, shapes[key], torch.float32 if key == "step" else dtype)
            if flaw or (key == "step" and value < 0):
                yield f"{key} of {name} {flaw or 'is negative'}"


def _other_digests(state: dict) -> Iterator[str]:
    """States of this version carry digests of their weights; they are compared once all else is in order."""
    for key, digest in (state.get("digests") or {}).items():
        if key in ("model", "ema") and (state.get(key) is None or digest != weights_fingerprint(state[key])):
            yield f"its {key} weights have another digest than it says: the file was changed or damaged"


def _flaw(value, shape, dtype: torch.dtype) -> str | None:
    """What is wrong with a value that should be a dense, finite tensor of this shape and type; None: nothing."""
    if not isinstance(value, Tensor):
        return f"is {_short(value)}, not a tensor"
    if value.is_meta or value.layout != torch.strided or value.is_quantized or value.is_nested:
        return "holds no numbers (a meta, sparse or quantized tensor)"
    if value.shape != torch.Size(shape):
        return f"is {_form(value.shape)} instead of {_form(shape)}"
    if value.dtype != dtype:
        return f"is {value.dtype} instead of {dtype}"
    if not torch.isfinite(value).all():
        return "is not finite"
    return None


def _form(shape) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _short(value) -> str:
    text = f"{type(value).__name__} {value!r}" if _number(value) or isinstance(value, str) else \
        f"a {type(value).__name__}"
    return text[:60]
