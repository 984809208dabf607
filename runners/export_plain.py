"""ADM's and EDM's networks for the programs that they come from: a plain state dict and a JSON of arguments.

``models.formats.plain`` says what the two files hold, and reads them.
"""

import json
from math import inf
from pathlib import Path

import torch

from functions.levels import iddpm_chain
from models.formats.edm_settings import NETWORKS, PRECONDITIONERS
from models.formats.plain import BETAS, SAME
from utils.errors import UserError

EDM_ARCHS = {arch: name for name, (arch, _) in NETWORKS.items()}                   # "songunet": "SongUNet"
CLASSES = {prediction: name for name, (prediction, _) in PRECONDITIONERS.items()}  # "edm": "EDMPrecond"
RANGED = {"edm", "ve"}                                       # whose classes take sigma_min and sigma_max


def arguments_of(config) -> dict:
    """What the JSON beside the weights holds.

    Raises:
        UserError: The other program has no network, process or image size that is the same.
    """
    if config.data.height != config.data.width:
        raise UserError(f"--export: data.image_size {config.data.image_size}; these programs know square images only")
    return _adm(config) if config.model.arch == "adm" else _edm(config)


def _adm(config) -> dict:
    """Arguments of guided-diffusion's UNetModel and of its create_gaussian_diffusion."""
    model, diffusion, size = config.model, config.diffusion, config.data.height
    T, linear = diffusion.num_steps, {name: ours for ours, name in BETAS.items()}
    schedule = linear.get(diffusion.beta_schedule)
    if (diffusion.beta_schedule, diffusion.beta_start, diffusion.beta_end) == ("linear", 0.1 / T, 20 / T):
        schedule = "linear"                                  # DDPM's, which is guided-diffusion's for these T
    for wrong, what in (
            (diffusion.schedule != "discrete", f"diffusion.schedule {diffusion.schedule}"),
            (diffusion.prediction not in ("epsilon", "sample"), f"diffusion.prediction {diffusion.prediction}"),
            (diffusion.betas is not None or diffusion.zero_terminal_snr or schedule is None,
             "other betas than its linear and cosine ones")):
        if wrong:
            raise UserError(f"--export: guided-diffusion does not compute {what}")
    network = {key: getattr(model, key) for key in SAME if key != "channel_mult"}
    return {
        "class_name": "UNetModel",
        "init_kwargs": {
            "image_size": size, "model_channels": model.num_channels, **network,
            "channel_mult": [int(m) if m == int(m) else m for m in model.multipliers(config.data)],
            "out_channels": model.in_channels * (2 if model.learn_sigma else 1),
            "attention_resolutions": [size // side for side in model.attention_resolutions if side <= size],
            "num_classes": model.num_classes or None},
        "diffusion": {"steps": T, "noise_schedule": schedule, "learn_sigma": model.learn_sigma,
                      "predict_xstart": diffusion.prediction == "sample",
                      "rescale_timesteps": diffusion.rescale_timesteps,
                      "timestep_respacing": str(diffusion.timestep_respacing or "")},
    }


def _edm(config) -> dict:
    """Arguments of EDM's preconditioner, those of its network included."""
    model, diffusion = config.model, config.diffusion
    if diffusion.prediction not in CLASSES:
        raise UserError(f"--export: EDM has no preconditioner for diffusion.prediction {diffusion.prediction}")
    ranged = ("sigma_min", "sigma_max") if diffusion.prediction in RANGED else ()
    constants = {key: getattr(diffusion, key) for key in ("sigma_data", "beta_d", "beta_min", *ranged)}
    network = {key: value for key, value in model.model_dump(mode="json").items() if key not in ("arch", "in_channels")}
    return {
        "class_name": CLASSES[diffusion.prediction],
        "init_kwargs": {
            "img_resolution": config.data.height, "img_channels": model.in_channels,
            "model_type": EDM_ARCHS[model.arch], **network, "label_dropout": config.training.label_dropout,
            **{key: value for key, value in constants.items() if value not in (None, inf)}},
    }


def write_plain(config, state: dict, folder: Path) -> None:
    """weights.pt and weights.json."""
    arguments = arguments_of(config)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    if config.model.arch in EDM_ARCHS:
        own = {"u": torch.tensor(iddpm_chain())} if config.diffusion.prediction == "iddpm" else {}
        tensors = own | {f"model.{name}": tensor for name, tensor in tensors.items()}
    torch.save(tensors, folder / "weights.pt")
    (folder / "weights.json").write_text(json.dumps(arguments, indent=1) + "\n")


def usage(arguments: dict, target: Path) -> str:
    """Python that loads the folder in the other program."""
    name = arguments["class_name"]
    made_in = "guided_diffusion.unet" if name == "UNetModel" else "training.networks"
    return f"""import json, torch
from {made_in} import {name}

arguments = json.load(open("{target.name}/weights.json"))
network = {name}(**arguments["init_kwargs"]).eval()
network.load_state_dict(torch.load("{target.name}/weights.pt", weights_only=True))"""
