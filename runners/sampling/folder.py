"""A folder of generated images, and the manifest that says how they were made."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from configs.sampling import SamplerSettings
from utils.atomic import remove_leftovers, write_json
from utils.errors import DataError, UserError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ImageFolder:
    """Where image s lies: ``{s:06d}.png``, or in EDM's sub-folders of 1,000."""

    path: Path
    subdirs: bool = False

    def image(self, seed: int) -> Path:
        folder = self.path / f"{seed - seed % 1000:06d}" if self.subdirs else self.path
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
                stored = json.loads(file.read_text())
            except ValueError:
                raise DataError(f"{file}: not readable; remove the folder, or choose another --image_folder") from None
            different = [f"{key} {stored.get(key)!r}, now {manifest.get(key)!r}"
                         for key in sorted(stored.keys() | manifest.keys()) if stored.get(key) != manifest.get(key)]
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


def manifest_of(diffusion, settings: SamplerSettings) -> dict:
    """What determines the images of a ``Diffusion`` beside the seed, as plain values."""
    config = diffusion.config
    manifest = {
        "weights": diffusion.weights.fingerprint, "amp": str(diffusion.amp or "off"), "sampler": settings.given(),
        "model": {"arch": config.model.arch}, "diffusion": config.diffusion.model_dump(mode="json"),
        "data": config.data.model_dump(mode="json", include={"image_size", "channels", "rescaled", "logit_transform"}),
    }
    if diffusion.guide:
        manifest["guide"] = diffusion.guide.weights.fingerprint
    if diffusion.classifier:
        manifest["classifier"] = diffusion.classifier.fingerprint
    return manifest
