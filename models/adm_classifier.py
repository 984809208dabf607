"""guided-diffusion's noisy classifier: p(label | x_t, t), whose gradient guides a sampler (2105.05233, section 4)."""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.adm import Encoder
from models.adm_blocks import GroupNorm, attend, pointwise
from models.formats.adm import read_settings
from models.formats.common import bare_name, is_state
from models.precision import without_autocast
from utils.errors import DataError, UserError
from utils.safe_load import load_torch


class AttentionPool(nn.Module):
    """The mean of all pixels attends to them and itself, each with a learned position. (B, C, S, S) -> (B, classes)."""

    def __init__(self, side: int, width: int, head_width: int, classes: int):
        super().__init__()
        self.heads = width // head_width
        self.positional_embedding = nn.Parameter(torch.randn(width, side**2 + 1) / width**0.5)
        self.qkv_proj = nn.Conv1d(width, 3 * width, 1)
        self.c_proj = nn.Conv1d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).mT                                                               # (B, S^2, C)
        rows = torch.cat([rows.mean(1, keepdim=True), rows], dim=1) + self.positional_embedding.mT
        pooled = attend(pointwise(self.qkv_proj, rows), self.heads, new_order=True)[:, :1]   # (B, 1, C)
        return pointwise(self.c_proj, pooled)[:, 0]


class ADMClassifier(Encoder):
    """The way down and the middle of an ADM U-Net, then attention pooling.

    Args:
        num_outputs: Classes that it tells apart.
        num_head_channels: Width of a head, in the pooling too.
        Others: Those of ``Encoder``; the network itself gets no label. Images must be square.
    """

    def __init__(self, *, image_size: int, num_outputs: int = 1000, num_head_channels: int = 64, **options):
        super().__init__(image_size=image_size, num_head_channels=num_head_channels, num_classes=0, **options)
        self.image_size, self.num_outputs = image_size, num_outputs
        side, width = image_size // 2 ** (len(self.widths) - 1), self.widths[-1]
        pool = AttentionPool(side, width, num_head_channels, num_outputs)
        self.out = nn.Sequential(GroupNorm(width), nn.SiLU(), pool)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits, (B, num_outputs), of noisy images (B, in_channels, image_size, image_size) at steps t (B,)."""
        h, _ = self.encode(x, self.embed(t))
        with without_autocast(x):
            return self.out(h.to(x.dtype))


HEAD_WIDTH = 64                      # of every published classifier; no tensor tells it


def load_classifier(path: str | Path) -> ADMClassifier:
    """A classifier with its weights; all its settings but the width of a head come from the file's tensors.

    Raises:
        UserError: No such file. DataError: It holds no classifier, or one whose heads are not 64 wide.
    """
    if not Path(path).exists():
        raise UserError(f"no such classifier: {path}")
    content = load_torch(path)
    if not is_state(content):
        raise DataError(f"{path}: no state dict of a noisy classifier")
    state = {bare_name(name): tensor for name, tensor in content.items()}
    try:
        settings = read_settings(state)
        size = settings["image_size"]                          # which only a classifier's tensors tell
        sides = [size // factor for factor in settings.pop("attention_factors")]
        classifier = ADMClassifier(attention_resolutions=sides, num_head_channels=HEAD_WIDTH, **settings)
        classifier.load_state_dict(state)
    except (DataError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: no noisy classifier of guided-diffusion: {reason}") from None
    return classifier
