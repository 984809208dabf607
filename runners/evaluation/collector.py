"""What the images that all ranks have seen leave behind: sums of their features, and the features where a metric needs
them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from functions.frechet import FeatureStats
from models.digit_classifier import FEATURES, DigitClassifier, load_digit_classifier
from models.inception import FeatureNet
from runners.distributed import gather_objects

# What features there are: of FID, of sFID, of the classifier of digits with its class probabilities behind them.
SPACES = ("pool", "spatial", "digits")
AT_ONCE = 256                                        # images: Inception takes 9 MiB for each


@dataclass(frozen=True)
class Measured:
    """Of one space, over all ranks.

    Attributes:
        stats: Count, mean and covariance.
        features: float32 (N, D) in the order of the indices, None where they were not kept.
    """

    stats: FeatureStats
    features: np.ndarray | None


class Collector:
    """Feature statistics of the images that this and the other ranks have seen.

    Args:
        net: Makes the features.
        keep_features: Keep every feature vector (8 KiB for each image), not only sums.
        spaces: Of ``SPACES``: which features to make.
    """

    def __init__(self, net: FeatureNet, keep_features: bool = False, spaces: Collection[str] = ("pool",)):
        self.net, self.keep_features = net, keep_features
        self.spaces = [space for space in SPACES if space in spaces]
        self.digits: DigitClassifier | None = load_digit_classifier(net.device) if "digits" in self.spaces else None
        dims = {"pool": lambda: net.dim, "spatial": lambda: net.spatial_dim, "digits": lambda: FEATURES}
        self.sums = {space: FeatureStats(dims[space]()) for space in self.spaces}
        self.features: dict[str, list[Tensor]] = {space: [] for space in self.spaces}    # float32 (B, D) on the CPU
        self.indices: list[int] = []
        self.image_size: list[int] | None = None                                         # [height, width]

    @property
    def stats(self) -> FeatureStats:
        """Of FID's features, this rank's."""
        return self.sums["pool"]

    def update(self, images: Tensor, indices: Sequence[int]) -> None:
        """Add this rank's images, uint8 (B, C, H, W), and their places in the whole set."""
        if not len(images):
            return
        self.image_size = list(images.shape[-2:])
        for start in range(0, len(images), AT_ONCE):
            self.add(self._features(images[start:start + AT_ONCE]), indices[start:start + AT_ONCE])

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        found = {}
        if "spatial" in self.spaces:
            found["pool"], found["spatial"] = self.net.with_spatial(images)
        elif "pool" in self.spaces:
            found["pool"] = self.net(images)
        if self.digits:
            found["digits"] = self.digits(images)
        return found

    def add(self, found: dict[str, Tensor], indices: Sequence[int]) -> None:
        """Add features that are there already, (B, D) by space."""
        for space in self.spaces:
            if len(found[space]) != len(indices):
                raise ValueError(f"{len(found[space])} images, but {len(indices)} indices")
            self.sums[space].update(found[space])
            if self.keeps(space):
                self.features[space].append(found[space].float().cpu())
        self.indices += [int(i) for i in indices]

    def keeps(self, space: str) -> bool:
        """The classifier's features are few numbers, and their probabilities are wanted one by one."""
        return self.keep_features or space == "digits"

    def gather(self) -> tuple[dict[str, Measured], np.ndarray]:
        """By space, what all ranks have seen, and indices (N,) ascending; the same on every rank. Collective."""
        indices = np.concatenate([np.asarray(share, np.int64) for share in gather_objects(self.indices)])
        order = np.argsort(indices, kind="stable")
        measured = {}
        for space in self.spaces:
            whole = FeatureStats(self.sums[space].dim)
            whole.count = sum(gather_objects(self.sums[space].count))
            whole.total, whole.outer = _sum_over_ranks(self.sums[space].total), _sum_over_ranks(self.sums[space].outer)
            measured[space] = Measured(whole, self._gather_features(space)[order] if self.keeps(space) else None)
        return measured, indices[order]

    def _gather_features(self, space: str) -> np.ndarray:
        own = self.features[space]
        mine = torch.cat(own).numpy() if own else np.empty((0, self.sums[space].dim), np.float32)
        return np.concatenate(gather_objects(mine))


def _sum_over_ranks(value: Tensor) -> Tensor:
    value = value.cpu().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value
