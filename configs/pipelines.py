"""What a folder of a diffusers pipeline says about itself, read from its JSON files by a list of known keys.

    model_index.json   unet/config.json   scheduler/scheduler_config.json   vae/config.json
"""

import json
import re
from os.path import isfile
from pathlib import Path

from utils.errors import ConfigError, DataError
from utils.files import MIB, open_regular, read_regular, read_settings

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
STABLE_BETAS = ("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler")
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def is_pipeline(path: Path) -> bool:
    return isfile(path / INDEX)


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
    start, end = (0.00085, 0.012) if name in STABLE_BETAS else (1e-4, 0.02)         # where the file does not say
    ends = {"beta_start": settings.get("beta_start", start), "beta_end": settings.get("beta_end", end)}
    keys = {
        "schedule": "discrete", "prediction": prediction, "beta_schedule": BETA_SCHEDULES[schedule],
        **(ends if BETA_SCHEDULES[schedule] != "cosine" else {}),                   # which reads neither
        "num_diffusion_timesteps": settings.get("num_train_timesteps", 1000), "betas": settings.get("trained_betas"),
        "zero_terminal_snr": settings.get("rescale_betas_zero_snr", False),
        "set_alpha_to_one": settings.get("set_alpha_to_one", name != "PNDMScheduler"),
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
            if key in diffusion.keys() & stored.keys() and key not in unread and diffusion[key] != stored[key]]


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
            "loss": {"num_consecutive_steps": 0, "lamda": 0.0, "reduce": "mean"}, "diffusion": diffusion_keys(folder)}


# ------------------------------------------------------------------------------------------- the parts of a pipeline


UNETS = ("UNet2DModel", "UNet2DConditionModel")
# Folder of a text encoder -> the class of transformers that reads it. The index of a pipeline may name any other,
# a library or in a file of its own, and diffusers before 0.36 executes that file.
TEXT_CLASSES = {"tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"), "text_encoder": ("CLIPTextModel",),
                "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
                "text_encoder_2": ("CLIPTextModelWithProjection",)}
MOST_LAYERS = 100                                        # of a block or an encoder; published ones have 32 at most
TEXT_LIMIT = 64 * MIB                                    # of a JSON file or vocabulary; CLIP's have 3 MB


def part_settings(file: Path) -> dict:
    """``config.json`` of a network, whose folder is safe to be read by diffusers and transformers.

    Raises:
        DataError: Missing, no settings, more layers than any network has, or see ``check_part``.
    """
    settings = read_settings(file)
    check_part(file.parent)
    for key, value in settings.items():
        counts = _flat(value) if "layers" in key else [len(value)] if isinstance(value, list) and "block" in key else []
        if any(isinstance(count, int | float) and not 0 <= count <= MOST_LAYERS for count in counts):
            raise DataError(f"{file}: {key} {str(value)[:40]}: at most {MOST_LAYERS} layers or blocks are possible")
    return settings


def _flat(value) -> list:
    return [each for item in value for each in _flat(item)] if isinstance(value, list) else [value]


def check_part(folder: Path) -> None:
    """Refuse a sub-folder of a pipeline of which a library would read what is no plain file, elsewhere, or a pickle.

    Raises:
        DataError: A pipe, a device or a link to one; a text beyond 64 MiB; adapters of a network elsewhere; an index
            that leads to anything but safetensors files beside it.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir():
            continue
        open_regular(path, TEXT_LIMIT if path.suffix in (".json", ".txt") else None, "text of a model").close()
        if path.name == "adapter_config.json":
            raise DataError(f"{path}: adapters of a network elsewhere, which are not followed; remove the file")
        if path.name.endswith(".safetensors.index.json"):
            _check_index(path)


def _check_index(path: Path) -> None:
    try:
        shards = json.loads(read_regular(path, TEXT_LIMIT, "index"))["weight_map"].values()
        odd = [name for name in shards if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{path}: no index of weights") from None
    if odd:
        raise DataError(f"{path}: leads to {odd[0][:80]}, which is no safetensors file beside it")


def text_classes(folder: Path, sized: bool) -> dict[str, str]:
    """Folders of the text encoders of a pipeline and the classes that read them.

    Raises:
        DataError: One is missing, is to be read by another class, or is not safe to be read.
    """
    index, found = read_settings(folder / INDEX), {}
    for part, known in TEXT_CLASSES.items():
        if part.endswith("_2") and not sized:
            continue
        if not (folder / part).is_dir():
            raise DataError(f"{folder}: has no folder {part}, without which it cannot read prompts")
        named = index.get(part)
        if not (isinstance(named, list) and len(named) == 2 and named[0] == "transformers" and named[1] in known):
            raise DataError(f"{folder / INDEX}: {part} is {str(named)[:80]}, not known here; known: {known[0]} of "
                            "transformers")
        (part_settings(folder / part / "config.json") if "encoder" in part else check_part(folder / part))
        found[part] = known[0]
    return found


def unet_settings(folder: Path) -> dict:
    """``unet/config.json``. Raises DataError: another kind of network."""
    file = folder / "unet" / "config.json"
    if not file.is_file():
        raise DataError(f"{folder}: has no unet/config.json; a pipeline with a U-Net is needed, such as DDPM, Stable "
                        "Diffusion 1 and 2 or XL")
    return known_unet(file)


def known_unet(file: Path) -> dict:
    """The settings of a U-Net. Raises DataError: another kind of network."""
    settings = part_settings(file)
    if settings.get("_class_name") not in UNETS:
        raise DataError(f"{file}: {settings.get('_class_name')!r} is not known here; known: {', '.join(UNETS)}")
    return settings


def takes_text(unet: dict) -> bool:
    return unet["_class_name"] == "UNet2DConditionModel"


def takes_sizes(unet: dict) -> bool:
    """Whether it is conditioned on pooled embeddings and image sizes, as SDXL is."""
    return unet.get("addition_embed_type") == "text_time"


def zeros_for_no_prompt(folder: Path) -> bool:
    """Whether SDXL is shown zeros instead of the empty prompt, as its index says; True where it says nothing."""
    return not is_pipeline(folder) or bool(read_settings(folder / INDEX).get("force_zeros_for_empty_prompt", True))


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
    settings = part_settings(found / "config.json")
    if settings.get("_class_name") != "AutoencoderKL":
        raise DataError(f"{found}: {settings.get('_class_name')!r} is not known here; AutoencoderKL is")
    return settings


def vae_factor(vae: dict) -> int:
    """Pixels along the side of one latent."""
    return 2 ** (len(vae.get("block_out_channels", [64])) - 1)
