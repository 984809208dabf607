"""The noisy classifier that guides a sampler, from a file of its weights alone."""

from pathlib import Path

import torch
from torch import Tensor

from models import load_classifier
from models.weights import weights_fingerprint
from runners.network import Network
from utils.errors import UserError


class Classifier:
    """Logits of noisy images, and what a sampler has to know about them.

    Args:
        path: A file of guided-diffusion's classifiers.
        shape: Of the images that it will see, (C, H, W).

    Raises:
        UserError: No such file, or a classifier of other images. DataError: No classifier.
    """

    def __init__(self, path: str | Path, shape: tuple[int, int, int]):
        model = load_classifier(path)
        own = (model.in_channels, model.image_size, model.image_size)
        if own != tuple(shape):
            raise UserError(f"--classifier {path} is for images of {_times(own)}, the network for {_times(shape)}")
        self.num_classes, self.fingerprint = model.num_outputs, weights_fingerprint(model.state_dict())
        self.model = model.requires_grad_(False).eval()
        self.network = Network(self.model, torch.device("cpu"))

    def to(self, device, amp: torch.dtype | None = None) -> "Classifier":
        """This object, which computes on ``device`` from now on; ``amp`` is the autocast type, or None."""
        self.network = Network(self.model.to(device), torch.device(device), amp)
        return self

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, C, H, W), (B,) -> (B, num_classes)"""
        return self.network(x, t)


def _times(shape) -> str:
    return "x".join(map(str, shape))
