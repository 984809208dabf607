"""Plain state dicts of ADM's and EDM's networks with a JSON of constructor arguments beside them.

    weights.pt       tensors by the names of guided-diffusion's UNetModel, or of EDM's preconditioner (``model.`` ...)
    weights.json     {"class_name": "EDMPrecond", "init_kwargs": {...}}, what to call before ``load_state_dict``;
                     UNetModel has "diffusion" as well, the arguments of guided-diffusion's create_gaussian_diffusion

``runners.export_plain`` writes both; any other program may, too.
"""

import json
from pathlib import Path

from models.formats.common import StoredWeights, bare, bare_name, is_state
from models.formats.edm_settings import settings_from
from utils.errors import DataError
from utils.files import open_regular

MAX_BYTES = 1_000_000
BETAS = {"linear": "adm_linear", "cosine": "cosine"}                       # guided-diffusion's names, and ours
FIXED = {"dims": 2, "use_checkpoint": False, "use_fp16": False}            # of UNetModel, and no part of what it is
SAME = ("in_channels", "num_res_blocks", "dropout", "channel_mult", "conv_resample", "num_heads", "num_head_channels",
        "num_heads_upsample", "use_scale_shift_norm", "resblock_updown", "use_new_attention_order")
UNET_DEFAULTS = {"num_heads": 1, "use_scale_shift_norm": False, "channel_mult": [1, 2, 4, 8]}      # unlike those here
OTHERS = {"image_size", "model_channels", "out_channels", "attention_resolutions", "num_classes"}


def is_edm_state(path: Path, content) -> bool:
    """The state dict of one of EDM's preconditioners: the network's names with ``model.`` in front, iDDPM's table u."""
    return is_state(content) and all(bare_name(name).startswith("model.") for name in content.keys() - {"u"})


def read_edm_state(path: Path, content: dict, ema: bool) -> StoredWeights:
    state = bare(content, path, "content")
    return StoredWeights({name.removeprefix("model."): tensor for name, tensor in state.items() if name != "u"})


def settings_beside(path: Path) -> dict[str, dict] | None:
    """Sections of a configuration from the JSON beside a file of weights; None where there is none of this kind.

    Raises:
        DataError: It is broken, or describes a network that is unknown here.
    """
    beside = path.with_suffix(".json")
    if path.suffix not in (".pt", ".pth") or not beside.is_file():
        return None
    with open_regular(beside, MAX_BYTES, "JSON of arguments") as file:
        try:
            content = json.loads(file.read())
        except (ValueError, RecursionError):
            raise DataError(f"{beside}: not read, broken or no JSON") from None
    if not isinstance(content, dict) or not {"class_name", "init_kwargs"} <= content.keys():
        return None
    name, given, process = content["class_name"], content["init_kwargs"], content.get("diffusion", {})
    if not (isinstance(name, str) and isinstance(given, dict) and isinstance(process, dict)):
        raise DataError(f"{beside}: class_name must be a text, init_kwargs and diffusion must be objects")
    return _of_adm(beside, given, process) if name == "UNetModel" else settings_from(beside, name, given)


def _of_adm(where: Path, given: dict, process: dict) -> dict[str, dict]:
    unknown = given.keys() - set(SAME) - OTHERS - FIXED.keys()
    if unknown or given.get("dims", 2) != 2:
        raise DataError(f"{where}: its UNetModel has the argument {min(unknown or {'dims'})}, which is unknown here; "
                        f"known: {', '.join(sorted({*SAME, *OTHERS}))}")
    size, channels, factors = (given.get(key) for key in ("image_size", "in_channels", "attention_resolutions"))
    if not all(type(n) is int and n > 0 for n in (size, channels)) or not (
            isinstance(factors, list) and all(type(n) is int and n > 0 for n in factors)):
        raise DataError(f"{where}: image_size and in_channels must be whole numbers, attention_resolutions a list of "
                        "factors by which the image is smaller")
    steps = process.get("steps", 1000)
    if type(steps) is not int or steps < 1:
        raise DataError(f"{where}: steps {str(steps)[:40]!r} must be a whole number from 1")
    if process.get("noise_schedule", "linear") not in BETAS:
        raise DataError(f"{where}: noise_schedule {process['noise_schedule']!r} is unknown; known: {', '.join(BETAS)}")
    model = UNET_DEFAULTS | {key: given[key] for key in SAME if key in given}
    learned = given.get("out_channels", channels) == 2 * channels
    return {
        "data": {"image_size": size, "channels": channels},
        "model": {"arch": "adm", **model, "num_channels": given.get("model_channels", 128),
                  "attention_resolutions": [size // factor for factor in factors],
                  "learn_sigma": learned, "num_classes": given.get("num_classes") or 0},
        "diffusion": {"beta_schedule": BETAS[process.get("noise_schedule", "linear")],
                      "num_diffusion_timesteps": steps,
                      "prediction": "sample" if process.get("predict_xstart") else "epsilon",
                      "rescale_timesteps": process.get("rescale_timesteps", False),
                      "timestep_respacing": process.get("timestep_respacing") or None},
        "loss": {"num_consecutive_steps": 0, "lamda": 0.0, "reduce": "mean",
                 "variational": "hybrid" if learned else "none"},
        "training": {"sample_timesteps": 1},                               # which every chain has
    }
