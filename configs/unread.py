"""Keys that only some settings read. Where nothing would read them they are refused instead of ignored."""

import json
from collections.abc import Iterable
from typing import NamedTuple


class Readers(NamedTuple):
    key: str                 # of which one of ...
    values: Iterable[str]    # ... these reads ...
    keys: Iterable[str]      # ... these keys


READERS = (
    Readers("diffusion.schedule", ("discrete",), (                      # but what a file says of its betas may stay
        "diffusion.timestep_respacing", "diffusion.zero_terminal_snr", "diffusion.rescale_timesteps")),
    Readers("diffusion.schedule", ("sigma",), ("diffusion.rho",)),
    Readers("diffusion.schedule", ("sigma", "flow"), ("diffusion.rungs",)),
    Readers("diffusion.schedule", ("flow",), ("diffusion.shift",)),
    Readers("diffusion.prediction", ("edm",), ("diffusion.sigma_data",)),
    Readers("diffusion.prediction", ("vp",), ("diffusion.beta_d", "diffusion.beta_min")),
    Readers("training.time_sampler", ("lognormal", "logit_normal"), ("training.time_mean", "training.time_std")),
    Readers("optim.optimizer", ("Adam", "AdamW"), ("optim.amsgrad", "optim.beta2")),
    Readers("optim.optimizer", ("Adam", "AdamW", "SGD"), ("optim.beta1",)),
    Readers("optim.optimizer", ("Adam", "AdamW", "RMSProp"), ("optim.eps",)),
    Readers("model.arch", ("diffusers",), ("data.random_crop", "data.variants", "data.latent_dtype")),
    Readers("data.dataset", ("LSUN",), ("data.category",)),
)


def check_all_are_read(config) -> None:
    """ValueError naming the first key with another value than its default that no part of the program would read."""
    for readers in READERS:
        if _value(config, readers.key)[0] in readers.values:
            continue
        for key in readers.keys:
            given, default = _value(config, key)
            if given != default:
                raise ValueError(f"{key} {given} is for {readers.key} {' or '.join(readers.values)}, not for "
                                 f"{_value(config, readers.key)[0]}; leave it at {json.dumps(default)}")


def _value(config, key: str) -> tuple:
    """What is given at a dotted key, and its default."""
    section, name = key.split(".")
    section = getattr(config, section)
    return getattr(section, name), type(section).model_fields[name].default
