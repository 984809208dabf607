"""A folder of generated images, and the manifest that says how they were made."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from configs.sampling import SamplerSettings
from models.pretrained import ENCODERS, pipeline_fingerprint
from runners.conditioning import PROMPT_STRIDE
from runners.sampling.gamma import read_gamma
from utils.atomic import remove_leftovers, write_json
from utils.errors import DataError, UserError
from utils.files import MIB, read_regular
from utils.hub import local_folder

MANIFEST = "manifest.json"
LARGEST = 16 * MIB                            # of a manifest


@dataclass(frozen=True)
class ImageFolder:
    """Where image s lies: ``{s:06d}.png``, or in EDM's sub-folders of 1,000; of several prompts in one for each."""

    path: Path
    subdirs: bool = False
    prompts: int = 1

    def image(self, number: int) -> Path:
        prompt, seed = divmod(number, PROMPT_STRIDE)
        folder = self.path / f"prompt_{prompt:04d}" if self.prompts > 1 else self.path
        folder = folder / f"{seed - seed % 1000:06d}" if self.subdirs else folder
        return folder / f"{seed:06d}.png"

    def prepare(self, manifest: dict) -> None:
        """Write the manifest, or check that the folder's own one is the same.

        Raises:
            UserError: The folder holds images made in another way, or files of unknown origin.
        """
        file = self.path / MANIFEST
        self._refuse_foreign()
        if file.exists():
            try:
                stored = json.loads(read_regular(file, LARGEST, "manifest"))
            except (ValueError, RecursionError):
                raise DataError(f"{file}: not readable; remove the folder, or choose another --image_folder") from None
            if not isinstance(stored, dict):
                raise DataError(f"{file}: no manifest of this program; remove the folder, or choose another "
                                "--image_folder")
            older = {"network"} - stored.keys()                     # which folders did not tell from the beginning
            different = changes(stored, {key: value for key, value in manifest.items() if key not in older})
            if different:
                raise UserError(f"{self.path} holds images made with other settings ({'; '.join(different)}); "
                                "choose another --image_folder")
        elif self.path.exists() and any(not p.name.startswith(".") for p in self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and has no {MANIFEST}; choose another --image_folder")
        else:
            write_json(file, manifest)
        remove_leftovers(self.path)

    def _refuse_foreign(self) -> None:
        foreign = [p for p in self.path.rglob("*") if p.is_file() and not p.name.startswith(".")
                   and not re.fullmatch(r"manifest\.json|\d{6,}\.png|samples_[\dx]+\.npz", p.name)]
        if foreign:
            raise UserError(f"{self.path} holds {len(foreign)} file(s) that were not made here, such as "
                            f"{min(foreign).name}; choose another --image_folder")


def gamma_fingerprint(settings: SamplerSettings) -> dict:
    """Which numbers analytic variances are made of, wherever their file lies; empty without."""
    return {"gamma": read_gamma(settings.gamma).fingerprint} if settings.gamma else {}


def changes(stored: dict, given: dict, path: str = "") -> list[str]:
    """What differs between two manifests, each value by its dotted key; they leave out defaults."""
    found = []
    for key in sorted(stored.keys() | given.keys()):
        old, new = stored.get(key), given.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes(old, new, f"{path}{key}.")
        elif old != new:
            was, now = ("the default" if value is None else repr(value) for value in (old, new))
            found.append(f"{path}{key} was {was}, is {now}")
    return found


def manifest_of(diffusion, settings: SamplerSettings) -> dict:
    """What determines the images of a ``Diffusion`` beside the seed, as plain values."""
    config, gamma = diffusion.config, gamma_fingerprint(settings)
    manifest = {
        "weights": diffusion.weights.fingerprint, "amp": str(diffusion.amp or "off"),
        "sampler": {**settings.given(), **gamma},
        "model": {"arch": config.model.arch, **_pipeline_of(config)}, "network": _network_of(config),
        "diffusion": config.diffusion.model_dump(mode="json"),
        "data": config.data.model_dump(mode="json", include={"image_size", "channels", "rescaled", "logit_transform"}),
    }
    if diffusion.guide:
        manifest["guide"] = diffusion.guide.weights.fingerprint
        manifest["guide_network"] = _network_of(diffusion.guide.config)
    if diffusion.prompts:
        manifest["prompts"], manifest["negative_prompt"] = diffusion.prompts.texts, diffusion.prompts.negative
    if diffusion.classifier:
        manifest["classifier"] = diffusion.classifier.fingerprint
    return manifest


def _network_of(config) -> dict:
    """What weights do not tell of what they compute, such as the number of heads; a pipeline's files tell it all."""
    essence = {} if config.model.arch == "diffusers" else set(config.model.essence())
    return config.model.model_dump(mode="json", include=essence)


def _pipeline_of(config) -> dict:
    """What comes from a pipeline's folder: autoencoder and text encoders, and the weights beside adapters."""
    if config.model.arch != "diffusers":
        return {}
    parts = ENCODERS if config.model.lora_rank is None else ("unet", *ENCODERS)
    return {"pipeline": pipeline_fingerprint(local_folder(config.model.pretrained), parts)}
