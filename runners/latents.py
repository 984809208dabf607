"""Packing of latents and embeddings: what the autoencoder and the text encoders make of a data set, once."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from configs.pipelines import takes_sizes, takes_text, unet_settings
from datasets import open_dataset
from datasets.crops import crops
from datasets.latents import LatentStore, open_latents
from datasets.packed import packs_folder
from models.pretrained import ENCODERS, pipeline_fingerprint
from models.text import TextEncoders
from utils.errors import UserError
from utils.hub import local_folder

VERSION = 1                                          # of what is stored for an image


def open_latent_images(config, codec, root=None, split: str = "train", device="cpu") -> LatentStore:
    """The latents of a data set, packed on first use; ranks and jobs that come meanwhile wait.

    Autoencoder and text encoders leave memory afterwards.

    Args:
        codec: VAE of the configuration.
        root: The folder that holds data sets.

    Raises:
        UserError: A data set without captions for a network that needs them. DataError: Bad data; no space.
    """
    data, folder = config.data, local_folder(config.model.pretrained)
    unet = unet_settings(folder)
    images = open_dataset(config, root, split)
    captions = images.reader.captions if takes_text(unet) else None
    if takes_text(unet) and captions is None:
        raise UserError(f"data.dataset {data.dataset} has no captions, which the network of {folder} needs; use "
                        "CAPTIONS")
    encoder = _Encoder(images, captions, codec, folder, config, takes_sizes(unet), device)
    try:
        return open_latents(
            packs_folder(root), images, fingerprint=_fingerprint(images, folder, data, config.training.seed),
            dtype=data.latent_dtype, captions=captions, device=device, cache=data.cache, skip_bad=data.skip_bad,
            encode=encoder.rows, empty=encoder.empty)
    finally:
        codec.release()


class _Encoder:
    """The rows of an image; text encoders are loaded when the first is asked for."""

    def __init__(self, images, captions: list[str] | None, codec, folder: Path, config, sized: bool, device):
        self.images, self.captions, self.codec, self.folder = images, captions, codec, folder
        self.data, self.seed, self.sized, self.device = config.data, config.training.seed, sized, torch.device(device)
        self._text = None

    @property
    def text(self) -> Callable:
        if self._text is None:
            self._text = TextEncoders(self.folder, self.device)
        return self._text

    def rows(self, i: int) -> dict[str, Tensor]:
        data = self.data
        windows, ids = crops(self.images.reader.read(i), (data.height, data.width), data.variants, data.random_crop,
                             data.random_flip, (self.seed, i))
        pixels = torch.from_numpy(windows).permute(0, 3, 1, 2).to(self.device)                # (V, C, H, W)
        rows = {"moments": self.codec.moments(pixels).cpu()}                                  # (V, 2, c, h, w)
        if self.sized:
            rows["time_ids"] = torch.from_numpy(ids)                                          # (V, 6)
        if self.captions:
            rows |= {name: row[0] for name, row in self.text(self.captions[i])[0].items()}
        return rows

    def empty(self) -> dict[str, Tensor]:
        return {name: row[0] for name, row in self.text("")[1].items()} if self.captions else {}


def _fingerprint(images, folder: Path, data, seed: int) -> str:
    """16 hexadecimal digits over the images, the files of all encoders, and how images are cut and stored."""
    how = [VERSION, images.fingerprint, data.variants, data.random_crop, data.random_flip, data.latent_dtype,
           seed if data.random_crop else None]
    return hashlib.sha256(json.dumps([*how, pipeline_fingerprint(folder, ENCODERS)]).encode()).hexdigest()[:16]
