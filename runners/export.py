"""A trained network as a folder that another program loads, with a model card.

    pixels    unet/  scheduler/  model_index.json  README.md               DDIMPipeline.from_pretrained(DIR)
    text      unet/  README.md                                             from_pretrained(BASE, unet=...)
    LoRA      pytorch_lora_weights.safetensors  README.md                  pipeline.load_lora_weights(DIR)
    ADM, EDM  weights.pt  weights.json  README.md                          class(**arguments), load_state_dict
"""

import json
import os
import shutil
import uuid
from pathlib import Path

from configs.pipelines import PREDICTIONS, takes_text, unet_settings
from functions.betas import make_betas
from models.pretrained import LORA_FILE, lora_to_file, plain_unet
from models.to_diffusers import to_diffusers, unet_keys
from models.trained import trained
from runners.export_plain import arguments_of, usage, write_plain
from runners.model_card import model_card
from utils.errors import UserError
from utils.hub import local_folder, needs_package, quiet_libraries


def check_export(job, folder: str) -> None:
    """Everything that ``export`` would refuse.

    Raises:
        UserError: The folder is not empty; or the other program has no network, schedule or range that is the same.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--export {folder}: is there already; name a new folder")
    config = job.config
    if config.model.arch == "unet":
        unet_keys(config)
    if config.model.arch in ("unet", "diffusers"):
        _check_chain(config)
    else:
        arguments_of(config)


def _check_chain(config) -> None:
    """What pipelines of diffusers take for granted."""
    diffusion, data = config.diffusion, config.data
    for wrong, what in (
            (diffusion.schedule != "discrete", f"diffusion.schedule {diffusion.schedule}: DDIMScheduler has steps"),
            (diffusion.prediction not in PREDICTIONS,
             f"diffusion.prediction {diffusion.prediction}: DDIMScheduler knows {', '.join(PREDICTIONS)}"),
            (diffusion.timestep_respacing is not None,
             f"diffusion.timestep_respacing {diffusion.timestep_respacing}: its scheduler tells other times"),
            (diffusion.rescale_timesteps and diffusion.num_steps != 1000,
             f"diffusion.rescale_timesteps with {diffusion.num_steps} steps: its U-Net is told whole steps"),
            (not data.rescaled or data.logit_transform, "images that are not in [-1, 1] (data.rescaled): its "
                                                        "pipelines take them to be")):
        if wrong:
            raise UserError(f"--export: diffusers does not compute this: {what}")


def export(job, diffusion, folder: str) -> None:
    """Write ``folder``, whole or not at all, and print how it is loaded."""
    check_export(job, folder)
    target, config = Path(folder), diffusion.config
    target.parent.mkdir(parents=True, exist_ok=True)
    made = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    made.mkdir()
    try:
        with quiet_libraries():
            usage = EXPORTERS[config.model.arch](diffusion, made, target)
        card = made / "README.md"
        card.write_text(model_card(job, diffusion, usage))
        for file in made.rglob("*.*"):                       # safetensors lets the owner alone read what it writes
            file.chmod(card.stat().st_mode)
        if target.exists():
            target.rmdir()                                   # it is empty, or this fails
        os.rename(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    print(f"export  {target}")


def _export_unet(diffusion, made: Path, target: Path) -> str:
    from diffusers import DDIMPipeline

    config = diffusion.config
    unet = to_diffusers(config, diffusion.model.state_dict())
    DDIMPipeline(unet, ddim_scheduler(config.diffusion)).save_pretrained(made)
    return _ddim_usage(target)


def _export_pretrained(diffusion, made: Path, target: Path) -> str:
    config = diffusion.config
    model = diffusion.model
    base, settings = config.model.pretrained, unet_settings(local_folder(config.model.pretrained))
    if config.model.lora_rank is not None:
        from safetensors.torch import save_file

        adapters = {name: tensor.detach().cpu() for name, tensor in trained(model).items()}
        save_file(lora_to_file(adapters, model.lora_scale), made / LORA_FILE, metadata={"format": "pt"})
        return _lora_usage(target, base, settings)
    plain = plain_unet(model, model.state_dict())
    if not takes_text(settings) and not hasattr(diffusion.codec, "moments"):
        from diffusers import DDIMPipeline

        DDIMPipeline(plain, ddim_scheduler(config.diffusion)).save_pretrained(made)
        return _ddim_usage(target)
    plain.save_pretrained(made / "unet")
    return _unet_usage(target, base, settings)


def _export_plain(diffusion, made: Path, target: Path) -> str:
    write_plain(diffusion.config, diffusion.model.state_dict(), made)
    return usage(arguments_of(diffusion.config), target)


EXPORTERS = {"unet": _export_unet, "diffusers": _export_pretrained, "adm": _export_plain, "songunet": _export_plain,
             "dhariwal": _export_plain}


def ddim_scheduler(diffusion):
    """diffusers' DDIMScheduler for a ``diffusion`` section: the same betas, spacing and end; nothing is clipped."""
    try:
        from diffusers import DDIMScheduler
    except ImportError as error:
        raise needs_package(error, "--export") from None
    same = {"linear": "linear", "quad": "scaled_linear", "scaled_linear": "scaled_linear"}
    named = same.get(diffusion.beta_schedule) if diffusion.betas is None else None
    betas = {"beta_schedule": named, "beta_start": diffusion.beta_start, "beta_end": diffusion.beta_end} if named else {
        "trained_betas": make_betas(diffusion).tolist()}
    spacing = diffusion.skip_type if diffusion.skip_type in ("trailing", "linspace") else "leading"
    return DDIMScheduler(
        num_train_timesteps=diffusion.num_steps, **betas, clip_sample=False, prediction_type=diffusion.prediction,
        set_alpha_to_one=diffusion.set_alpha_to_one, steps_offset=diffusion.steps_offset, timestep_spacing=spacing,
        rescale_betas_zero_snr=bool(named and diffusion.zero_terminal_snr))


# --------------------------------------------------------------------------------------------------------- how to use


def _ddim_usage(target: Path) -> str:
    return f"""from diffusers import DDIMPipeline

pipeline = DDIMPipeline.from_pretrained({json.dumps(target.name)})
image = pipeline(num_inference_steps=50, eta=0.0).images[0]"""


def _pipeline_class(settings: dict) -> str:
    from configs.pipelines import takes_sizes

    if not takes_text(settings):
        return "LDMPipeline"
    return "StableDiffusionXLPipeline" if takes_sizes(settings) else "StableDiffusionPipeline"


def _prompt(settings: dict) -> str:
    return '"a prompt"' if takes_text(settings) else ""


def _unet_usage(target: Path, base: str, settings: dict) -> str:
    kind, name = settings["_class_name"], _pipeline_class(settings)
    return f"""from diffusers import {name}, {kind}

unet = {kind}.from_pretrained({json.dumps(target.name)}, subfolder="unet")
pipeline = {name}.from_pretrained({json.dumps(base)}, unet=unet)
image = pipeline({_prompt(settings)}).images[0]"""


def _lora_usage(target: Path, base: str, settings: dict) -> str:
    name = _pipeline_class(settings)
    return f"""from diffusers import {name}

pipeline = {name}.from_pretrained({json.dumps(base)})
pipeline.load_lora_weights({json.dumps(target.name)})
image = pipeline({_prompt(settings)}).images[0]"""
