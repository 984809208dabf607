"""Keys that only some settings read. Where nothing would read them they are refused instead of ignored."""

import json
import logging
from collections.abc import Container

from configs.sections import DiffusionSection

log = logging.getLogger(__name__)
# (key -> values of it with which one of them is enough, keys that are read then)
READERS: tuple[tuple[dict[str, tuple[str, ...]], tuple[str, ...]], ...] = (
    ({"diffusion.schedule": ("discrete",)}, (
        "diffusion.timestep_respacing", "diffusion.zero_terminal_snr", "diffusion.rescale_timesteps",
        "diffusion.beta_schedule", "diffusion.beta_start", "diffusion.beta_end", "diffusion.num_diffusion_timesteps",
        "diffusion.betas", "diffusion.set_alpha_to_one", "diffusion.steps_offset")),
    ({"diffusion.beta_schedule": ("linear", "quad", "sigmoid", "scaled_linear")}, ("diffusion.beta_start",)),
    ({"diffusion.beta_schedule": ("linear", "quad", "const", "sigmoid", "scaled_linear")}, ("diffusion.beta_end",)),
    ({"diffusion.schedule": ("sigma", "flow")}, ("diffusion.rungs",)),
    ({"diffusion.schedule": ("sigma",)}, ("diffusion.rho",)),
    ({"diffusion.schedule": ("flow",)}, ("diffusion.shift",)),
    ({"diffusion.schedule": ("sigma",), "diffusion.prediction": ("edm", "ve"), "training.time_sampler": ("ve",)}, (
        "diffusion.sigma_min", "diffusion.sigma_max")),
    ({"diffusion.prediction": ("edm",)}, ("diffusion.sigma_data",)),
    ({"diffusion.prediction": ("vp",), "training.time_sampler": ("vp",)}, ("diffusion.beta_d", "diffusion.beta_min")),
    ({"training.time_sampler": ("lognormal", "logit_normal")}, ("training.time_mean", "training.time_std")),
    ({"optim.optimizer": ("Adam", "AdamW")}, ("optim.amsgrad", "optim.beta2")),
    ({"optim.optimizer": ("Adam", "AdamW", "SGD")}, ("optim.beta1",)),
    ({"optim.optimizer": ("Adam", "AdamW", "RMSProp")}, ("optim.eps",)),
    ({"model.arch": ("diffusers",)}, ("data.random_crop", "data.variants", "data.latent_dtype")),
    ({"data.dataset": ("LSUN", "ZIP", "FOLDER", "CAPTIONS")}, ("data.category",)),     # in names of FID references
)
# Files of DDIM and of older runs have these beside any schedule.
BETAS = {"diffusion.beta_schedule", "diffusion.beta_start", "diffusion.beta_end", "diffusion.num_diffusion_timesteps"}


def pass_over_betas(raw: dict, overridden: Container[str]) -> None:
    """Take out of a file what its schedule does not read of ``BETAS``; overrides stay, to be refused."""
    diffusion = raw.get("diffusion", {})
    for readers, keys in READERS:
        reader, values = next(iter(readers.items()))
        if diffusion.get(reader.removeprefix("diffusion."), values[0]) in values:
            continue
        for name in [key.removeprefix("diffusion.") for key in keys if key in BETAS and key not in overridden]:
            if diffusion.pop(name, None) not in (None, DiffusionSection.model_fields[name].default):
                log.info("diffusion.%s is not read beside this %s", name, reader)


def check_all_are_read(config) -> None:
    """ValueError naming the first key with another value than its default that no part of the program would read."""
    for readers, keys in READERS:
        if any(_value(config, key)[0] in values for key, values in readers.items()):
            continue
        for key in keys:
            given, default = _value(config, key)
            if given != default:
                wanted = " or ".join(f"{reader} {' or '.join(values)}" for reader, values in readers.items())
                found = " and ".join(_value(config, reader)[0] for reader in readers)
                raise ValueError(f"{key} {given} is for {wanted}, not for {found}; leave it at {json.dumps(default)}")


def _value(config, key: str) -> tuple:
    """What is given at a dotted key, and its default."""
    section, name = key.split(".")
    section = getattr(config, section)
    return getattr(section, name), type(section).model_fields[name].default
