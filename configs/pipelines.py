"""What a folder of a diffusers pipeline says about itself, read from its JSON files by a list of known keys.

    model_index.json   unet/config.json   scheduler/scheduler_config.json   vae/config.json
"""

from pathlib import Path

from utils.errors import ConfigError, DataError
from utils.files import read_settings

INDEX, SCHEDULER = "model_index.json", Path("scheduler", "scheduler_config.json")
# Schedulers whose files describe a chain of betas, and how they space steps where the file does not say.
SPACING = {
    **dict.fromkeys(("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DDIMParallelScheduler",
                     "DDPMParallelScheduler"), "leading"),
    **dict.fromkeys((
        "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler",
        "UniPCMultistepScheduler"), "linspace"),
}
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def is_pipeline(path: Path) -> bool:
    try:
        return (path / INDEX).is_file()
    except (OSError, ValueError):                            # a name that is too long, or holds a null byte
        return False


def diffusion_keys(folder: Path) -> dict:
    """Keys of the ``diffusion`` section as the scheduler's file has them.

    How a chain is sampled (clipping, solver orders, Karras spacing) is no part of a model and is not read.

    Raises:
        DataError: No such file, or one that describes something else than a chain of betas.
    """
    file = folder / SCHEDULER
    settings = read_settings(file)
    name = settings.get("_class_name")
    schedule = settings.get("beta_schedule", "linear")
    prediction = settings.get("prediction_type", "epsilon")
    for key, given, known in (("_class_name", name, SPACING), ("beta_schedule", schedule, BETA_SCHEDULES),
                              ("prediction_type", prediction, PREDICTIONS)):
        if given not in known:
            raise DataError(f"{file}: {key} {given!r} is not known here; known: {', '.join(sorted(known))}")
    keys = {
        "schedule": "discrete", "prediction": prediction, "beta_schedule": BETA_SCHEDULES[schedule],
        "beta_start": settings.get("beta_start", 1e-4), "beta_end": settings.get("beta_end", 0.02),
        "num_diffusion_timesteps": settings.get("num_train_timesteps", 1000), "betas": settings.get("trained_betas"),
        "zero_terminal_snr": settings.get("rescale_betas_zero_snr", False),
        "set_alpha_to_one": settings.get("set_alpha_to_one", True),
        "skip_type": settings.get("timestep_spacing", SPACING[name]), "steps_offset": settings.get("steps_offset", 0),
    }
    return {key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()}


# What makes two chains different models; how their steps are spaced is a matter of sampling.
DECIDE_A_CHAIN = ("schedule", "prediction", "beta_schedule", "beta_start", "beta_end", "num_diffusion_timesteps",
                  "betas", "zero_terminal_snr")


def contradictions(diffusion: dict, folder: Path) -> list[str]:
    """Where a ``diffusion`` section says something else than the scheduler's file of a pipeline."""
    stored = diffusion_keys(folder)
    unread = {"beta_schedule", "beta_start", "beta_end", "num_diffusion_timesteps"} if stored["betas"] else set()
    return [f"diffusion.{key} {diffusion[key]!r}, {stored[key]!r} there" for key in DECIDE_A_CHAIN
            if key in diffusion and key not in unread and diffusion[key] != stored[key]]


def fill_in(raw: dict, folder: Path) -> dict:
    """The configuration with what the scheduler's file of ``folder`` says where the configuration is silent.

    Raises:
        ConfigError: The two contradict each other.
    """
    given = raw.get("diffusion") or {}
    if not isinstance(given, dict) or not (folder / SCHEDULER).is_file():
        return raw
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    if found := contradictions(plain, folder):
        raise ConfigError(f"{folder / SCHEDULER} contradicts the configuration: {'; '.join(found)}")
    return {**raw, "diffusion": {**diffusion_keys(folder), **given}}


def pipeline_configuration(folder: Path) -> dict:
    """The configuration of a pipeline folder that has none: its network and its chain, images of its size.

    Raises:
        DataError: Not a pipeline with a U-Net.
    """
    unet = unet_settings(folder)
    vae = vae_settings(folder)
    factor = vae_factor(vae) if vae else 1
    side = unet.get("sample_size") or 64
    size = tuple(factor * each for each in side) if isinstance(side, list) else factor * side
    channels = 3 if vae else unet.get("in_channels", 3)
    return {"data": {"dataset": "CAPTIONS" if takes_text(unet) else "FOLDER", "image_size": size, "channels": channels},
            "model": {"arch": "diffusers", "pretrained": str(folder)},
            "loss": {"reduce": "mean"}, "diffusion": diffusion_keys(folder)}


# ------------------------------------------------------------------------------------------- the parts of a pipeline


UNETS = ("UNet2DModel", "UNet2DConditionModel")


def unet_settings(folder: Path) -> dict:
    """``unet/config.json``. Raises DataError: another kind of network."""
    file = folder / "unet" / "config.json"
    if not file.is_file():
        raise DataError(f"{folder}: has no unet/config.json; a pipeline with a U-Net is needed, such as DDPM, Stable "
                        "Diffusion 1 and 2 or XL")
    return known_unet(file)


def known_unet(file: Path) -> dict:
    """The settings of a U-Net. Raises DataError: another kind of network."""
    settings = read_settings(file)
    if settings.get("_class_name") not in UNETS:
        raise DataError(f"{file}: {settings.get('_class_name')!r} is not known here; known: {', '.join(UNETS)}")
    return settings


def takes_text(unet: dict) -> bool:
    return unet["_class_name"] == "UNet2DConditionModel"


def takes_sizes(unet: dict) -> bool:
    """Whether it is conditioned on pooled embeddings and image sizes, as SDXL is."""
    return unet.get("addition_embed_type") == "text_time"


def vae_folder(folder: Path) -> Path | None:
    """Where the autoencoder lies: ``vae``, or ``vqvae`` as unconditional latent pipelines call it."""
    return next((folder / name for name in ("vae", "vqvae") if (folder / name / "config.json").is_file()), None)


def vae_settings(folder: Path) -> dict | None:
    """``vae/config.json``; None where a network works on pixels.

    Raises:
        DataError: A text-to-image pipeline without one, or another kind of autoencoder.
    """
    found = vae_folder(folder)
    if found is None:
        if takes_text(unet_settings(folder)):
            raise DataError(f"{folder}: has no vae/config.json, without which its latents are no images")
        return None
    settings = read_settings(found / "config.json")
    if settings.get("_class_name") != "AutoencoderKL":
        raise DataError(f"{found}: {settings.get('_class_name')!r} is not known here; AutoencoderKL is")
    return settings


def vae_factor(vae: dict) -> int:
    """Pixels along the side of one latent."""
    return 2 ** (len(vae.get("block_out_channels", [64])) - 1)
