"""From what an EDM snapshot says of its network to the sections of a configuration."""

import inspect
from math import inf
from pathlib import Path

from models.dhariwal import DhariwalUNet
from models.formats.edm import Part, Snapshot
from models.song import SongUNet
from utils.errors import DataError

# class: (its name in diffusion.prediction, the network that it has if none is named)
PRECONDITIONERS = {"EDMPrecond": ("edm", "DhariwalUNet"), "VPPrecond": ("vp", "SongUNet"),
                   "VEPrecond": ("ve", "SongUNet"), "iDDPMPrecond": ("iddpm", "DhariwalUNet")}
NETWORKS = {"SongUNet": ("songunet", SongUNet), "DhariwalUNet": ("dhariwal", DhariwalUNet)}

DRAWS = {"EDMLoss": "lognormal", "VPLoss": "vp", "VELoss": "ve"}                   # training.time_sampler
CONSTANTS = {"sigma_data", "beta_d", "beta_min", "sigma_min", "sigma_max"}         # keys of the diffusion section
FIXED = {"M": 1000, "epsilon_t": 1e-5, "C_1": 0.001, "C_2": 0.008}                 # what is known in one value only
UNBOUNDED = {"sigma_min": 0, "sigma_max": inf}                                      # EDMPrecond's way to say no range
OF_PRECONDITIONER = {"img_resolution", "img_channels", "use_fp16", "model_type", *CONSTANTS, *FIXED}
BUILT_IN = {"img_resolution", "in_channels", "out_channels"}                       # of the networks, filled in here


def settings_of(snapshot: Snapshot) -> dict[str, dict]:
    """``settings_from`` what a snapshot holds."""
    return settings_from(snapshot.path, snapshot.class_name, snapshot.init_kwargs, snapshot.loss)


def settings_from(where: Path, class_name: str, given: dict, loss: Part | None = None) -> dict[str, dict]:
    """Sections ``data``, ``model``, ``diffusion``, ``loss`` and ``training`` as plain dictionaries: what the arguments
    determine, all else has the defaults of its class, which are those of the configuration.

    Args:
        where: The file that says so, for messages.
        class_name: Of the preconditioner.
        given: Its constructor arguments, those of the network included.
        loss: How its levels were drawn.

    Raises:
        DataError: Another kind of network, or an argument that is unknown here.
    """
    if class_name not in PRECONDITIONERS:
        raise DataError(f"{where}: a network of class {class_name}; known: {', '.join(PRECONDITIONERS)}")
    prediction, usual = PRECONDITIONERS[class_name]
    network = given.get("model_type", usual)
    if not isinstance(network, str) or network not in NETWORKS:
        raise DataError(f"{where}: model_type is {network!r}; known: {', '.join(NETWORKS)}")
    arch, built = NETWORKS[network]
    of_network = set(inspect.signature(built).parameters) - BUILT_IN | {"label_dropout"}
    unknown = given.keys() - OF_PRECONDITIONER - of_network
    if unknown:
        raise DataError(f"{where}: its {network} has the argument {min(unknown)}, which is unknown here; known: "
                        f"{', '.join(sorted(OF_PRECONDITIONER | of_network))}")
    for name, value in FIXED.items():
        if given.get(name, value) != value:
            raise DataError(f"{where}: its {class_name} has {name} {given[name]}; only {value} is possible")
    for name in ("img_resolution", "img_channels"):
        if name not in given:
            raise DataError(f"{where}: its arguments do not say {name}")
    model = {key: value for key, value in given.items() if key in of_network - {"label_dropout"}}
    return {
        "data": {"image_size": given["img_resolution"], "channels": given["img_channels"]},
        "model": {"arch": arch, "in_channels": given["img_channels"], **model},
        "diffusion": {"schedule": "sigma", "prediction": prediction,
                      **{key: given[key] for key in sorted(CONSTANTS & given.keys())
                         if given[key] != UNBOUNDED.get(key)}},
        "loss": {"num_consecutive_steps": 0, "lamda": 0.0, "reduce": "sum"},       # as published: the plain loss
        "training": _training(loss) | {"label_dropout": given.get("label_dropout", 0)},
    }


def _training(loss: Part | None) -> dict:
    """How the levels were drawn."""
    if loss is None or loss.class_name not in DRAWS:
        return {}
    constants = {ours: loss.numbers[theirs] for theirs, ours in (("P_mean", "time_mean"), ("P_std", "time_std"))
                 if theirs in loss.numbers}
    return {"time_sampler": DRAWS[loss.class_name], **constants}


def about(snapshot: Snapshot) -> dict[str, str]:
    """What a snapshot says of itself, for people."""
    network = snapshot.init_kwargs.get("model_type", PRECONDITIONERS.get(snapshot.class_name, ("", "?"))[1])
    found = {"network": f"{snapshot.class_name} around {network}"}
    for name, part in (("loss", snapshot.loss), ("augmentation", snapshot.augment)):
        if part:
            numbers = ", ".join(f"{key} {value:g}" for key, value in part.numbers.items()
                                if isinstance(value, int | float) and value)
            found[name] = f"{part.class_name}: {numbers}"
    if snapshot.dataset:
        found["trained on"] = ", ".join(f"{key} {value}" for key, value in snapshot.dataset.items())
    return found
