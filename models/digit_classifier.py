"""A small classifier of scikit-learn's handwritten digits, whose features mean something for generated ones.

Inception has seen photographs; its distance between sets of 8x8 digits is mostly about edges of upscaled pixels. This
network of 21,546 parameters has seen digits. Its weights ship with the project; ``python -m runners.evaluation.digits``
is the recipe that made them.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.precision import full_precision
from utils.errors import DataError

WEIGHTS = Path(__file__).with_name("digit_classifier.safetensors")
SIDE, FEATURES, CLASSES = 8, 32, 10


class DigitNet(nn.Module):
    """Grey pictures in [0, 1], (B, 1, 8, 8) -> features (B, 32) -> class logits (B, 10)."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, FEATURES)
        self.out = nn.Linear(FEATURES, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)                 # (B, 32, 4, 4)
        return F.relu(self.hidden(h.flatten(1)))                                       # (B, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.features(x))


class DigitClassifier:
    """uint8 pictures of any size -> features in fp32, whatever autocast surrounds the call."""

    def __init__(self, network: DigitNet, device="cpu"):
        self.device = torch.device(device)
        self.network = network.to(self.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features before the last layer: uint8 (B, 1 or 3, H, W) -> float32 (B, 32)."""
        with full_precision(self.device):
            return self.network.features(shrink(images.to(self.device)))

    @torch.inference_mode()
    def probabilities(self, features: Tensor) -> Tensor:
        """Of the ten classes: features (B, 32) -> (B, 10)."""
        return self.network.out(features.to(self.device)).softmax(1)


def shrink(images: Tensor) -> Tensor:
    """Grey in [0, 1] at 8x8, by the mean of each cell: uint8 (B, C, H, W) -> float32 (B, 1, 8, 8)."""
    return F.adaptive_avg_pool2d(images.float().mean(1, keepdim=True) / 255, (SIDE, SIDE))


def load_digit_classifier(device="cpu", weights: Path = WEIGHTS) -> DigitClassifier:
    """The classifier with the weights that ship with the project.

    Raises:
        DataError: The file is absent, broken, or of another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    network = DigitNet()
    try:
        network.load_state_dict(load_file(weights))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{weights}: not the classifier of digits: {reason}; take the file of the repository, or make "
                        "it anew: python -m runners.evaluation.digits") from None
    return DigitClassifier(network, device)
