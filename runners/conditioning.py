"""What the images of a text-to-image network are conditioned on: typed prompts, or the captions of a data set.

A condition is a dictionary of tensors by name, batch first: ``labels``; or ``prompt_embeds``, and of SDXL
``pooled_embeds`` and ``time_ids``. Many prompts share one list of images: image number p * 2^32 + s is seed s of
prompt p, so that its noise is that of seed s.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from datasets.packed import to_device
from functions.rng import Seeds
from utils.errors import UserError

log = logging.getLogger(__name__)
PROMPT_STRIDE = 2**32                                # seeds are smaller
BY_SYNSET = ("adm", "edm", "edm-state")              # formats of weights of programs that number ImageNet so


def numbered(num_prompts: int, seeds: Seeds | range) -> Seeds | range:
    """The images of all prompts, prompt by prompt; ranges stay ranges."""
    if num_prompts == 1:
        return seeds
    parts = getattr(seeds, "ranges", [seeds])
    return Seeds(range(p * PROMPT_STRIDE + part.start, p * PROMPT_STRIDE + part.stop)
                 for p in range(num_prompts) for part in parts)


class Prompts(ABC):
    """What both kinds share.

    Args:
        empty: The rows of no prompt by name, one each.
        sizes: ``time_ids`` of the images that are made, (1, 6), or None for networks that take none.
        device: Where conditions go.
    """

    count = 1                                        # of prompts that share a list of images

    def __init__(self, empty: dict[str, Tensor], sizes: Tensor | None, device):
        self.empty = {name: rows.to(device) for name, rows in empty.items()}
        self.sizes, self.device = sizes if sizes is None else sizes.to(device), device

    @abstractmethod
    def of_seeds(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """The condition of each image."""

    def sized(self, condition: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        return condition if self.sizes is None else {**condition, "time_ids": self.sizes.expand(count, -1)}


def sizes_of(data) -> Tensor:
    """SDXL's ``time_ids`` of a whole image of the configured size: nothing cut off."""
    return torch.tensor([[data.height, data.width, 0, 0, data.height, data.width]], dtype=torch.float32)


class StoredPrompts(Prompts):
    """Captions of a LatentStore: image s has that of image s mod N."""

    def __init__(self, store, data):
        sizes = sizes_of(data) if "time_ids" in store.arrays else None
        super().__init__({name: rows[None] for name, rows in store.empty.items()}, sizes, store.device)
        self.store = store

    def of_seeds(self, seeds):
        rows = self.store.condition(torch.tensor([seed % self.store.num_images for seed in seeds]))
        return self.sized({name: rows[name] for name in self.empty}, len(seeds))


class TypedPrompts(Prompts):
    """Prompts of a command line or a file; each is encoded on its own when it is needed.

    Args:
        texts: Prompt p is ``texts[p]``.
        negative: The negative prompt; None: what the pipeline takes without one.
        encoders: TextEncoders.
        data: The ``data`` section of a configuration.
    """

    def __init__(self, texts: Sequence[str], negative: str | None, encoders, data):
        _, without = encoders("", negative)
        super().__init__(without, sizes_of(data) if encoders.pooled else None, encoders.device)
        self.texts, self.negative, self.count = list(texts), negative, len(texts)
        self._encoded = lru_cache(maxsize=64)(lambda text: encoders(text)[0])

    def of_seeds(self, seeds):
        rows = [self._encoded(self.texts[seed // PROMPT_STRIDE]) for seed in seeds]
        given = {name: torch.cat([row[name] for row in rows]).to(self.device) for name in rows[0]}
        return self.sized(given, len(seeds))


def without(condition: dict[str, Tensor], prompts: Prompts | None) -> dict[str, Tensor]:
    """The same images with no label and no prompt; their sizes stay."""
    return hide(condition, None, prompts)


def hide(condition: dict[str, Tensor], hidden: Tensor | None, prompts: Prompts | None) -> dict[str, Tensor]:
    """Labels and prompts taken away where ``hidden`` (B,) is true; None: everywhere."""
    result = dict(condition)
    for name in condition.keys() & ({"labels"} if prompts is None else prompts.empty.keys()):
        rows = condition[name]
        empty = rows.new_full((), -1) if prompts is None else prompts.empty[name].to(rows.device, rows.dtype)
        chosen = torch.ones(len(rows), dtype=torch.bool, device=rows.device) if hidden is None else hidden
        result[name] = torch.where(chosen.view(-1, *[1] * (rows.ndim - 1)), empty, rows)
    return result


@lru_cache
def warn_of_numbering(name: str) -> None:
    log.warning("%s numbers its classes as map_clsloc.txt does (0: n02119789, kit fox), published networks number "
                "synsets alphabetically (0: n01440764, tench): weights of one are told wrong classes; "
                "give ImageNet as a tree or zip of synset folders, with data.labels folders", name)


def conditions_of(images, num_labels: int, device, weights=None) -> Callable[[Tensor], dict[str, Tensor]]:
    """Image indices (B,) -> the condition of these images of an ImageStore, on the device; {} where there is none.

    Args:
        num_labels: Size of the network's label set.
        weights: WeightsInfo of the file that the network is from, or None.

    Raises:
        UserError: The images have no labels, or more classes than the network.
    """
    if hasattr(images, "condition"):
        return images.condition
    if not num_labels:
        return lambda indices: {}
    labels = torch.as_tensor(images.labels, device=device)                                      # long (N,)
    if labels.min() < 0 or labels.max() >= num_labels:
        raise UserError(f"{images.name} has labels {int(labels.min())} to {int(labels.max())} (-1: none); the "
                        f"network takes 0 to {num_labels - 1}")
    if images.name.startswith("imagenet") and weights and weights.format in BY_SYNSET:
        warn_of_numbering(images.name)
    return lambda indices: {"labels": labels[to_device(indices, device)]}
