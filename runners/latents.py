"""Packing of latents and embeddings: what the autoencoder and the text encoders make of a data set, once."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
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
        UserError: A data set without captions for a network that needs them, or with a transform of its own where
            crops are asked for. DataError: Bad data; no space.
    """
    data, folder = config.data, local_folder(config.model.pretrained)
    unet = unet_settings(folder)
    images = open_dataset(config, root, split)
    if not is_cropped(images) and (data.variants > 1 or data.random_crop):
        raise UserError(f"data.variants {data.variants}, data.random_crop {data.random_crop}: {data.dataset} has a cut "
                        "of its own, of which there are no others; leave them at 1 and false")
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


def is_cropped(images) -> bool:
    """Whether windows of its images may be chosen; other data sets have a transform of their own."""
    return images.how == "resize-center-crop"


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

    def _windows(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        """What is shown of an image, (V, H, W, C), and what SDXL is told about it, (V, 6)."""
        data = self.data
        if is_cropped(self.images):
            return crops(self.images.reader.read(i), (data.height, data.width), data.variants, data.random_crop,
                         data.random_flip, (self.seed, i))
        pixels = self.images.read(i)
        return np.stack([pixels, pixels[:, ::-1]] if data.random_flip else [pixels]), None

    def rows(self, i: int) -> dict[str, Tensor]:
        windows, ids = self._windows(i)
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
    how += [] if is_cropped(images) else [images.how]
    return hashlib.sha256(json.dumps([*how, pipeline_fingerprint(folder, ENCODERS)]).encode()).hexdigest()[:16]
