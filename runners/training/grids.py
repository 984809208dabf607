"""The sheet of pictures that training draws: real images, and samples of a deterministic and of a stochastic chain.

        real images      as many as fit into one row
        EMA, eta 0       EMA, eta 1        seeds 0, 1, ... in both
        raw, eta 0       raw, eta 1        while the average is still cold

What a network gets wrong adds up along a chain; fresh noise covers part of it, so that eta 1 may look good where eta 0
does not.
"""

import torch
from torch import Tensor

from datasets.latents import choose_variant
from functions.pixels import to_uint8
from models.ema import first_share
from utils.captions import captioned
from utils.png import GAP, columns_of, tile

COLD = 0.05                                          # share of the first weights that makes an average cold
ETAS = (0.0, 1.0)


@torch.no_grad()
def training_sheet(diffusion, images) -> Tensor:
    """uint8 (C, H, W): see above.

    Args:
        diffusion: Diffusion while it trains.
        images: ImageStore of the training images.
    """
    training, averages = diffusion.config.training, diffusion.averages
    num, columns = training.sample_num, columns_of(training.sample_num)
    num -= num % columns                                           # full rows only
    kinds = {"EMA": averages} if averages else {"raw": []}
    if averages and first_share(averages[0].decay, averages[0].updates, COLD) > COLD:
        kinds["raw weights (the EMA is still cold)"] = []
    rows = []
    try:
        for name, diffusion.averages in kinds.items():
            parts = {f"{name}, eta {eta:g}": _samples(diffusion, num, eta) for eta in ETAS}
            rows.append(_beside(parts, columns))
    finally:
        diffusion.averages = averages
    indices = torch.arange(2 * columns) % images.num_images
    real = _pixels(diffusion, next(images.batches([indices]))).cpu().split(columns)
    rows.insert(0, _beside({"real images": real[0], "real images, continued": real[1]}, columns))
    return torch.cat(rows, 1)


def _pixels(diffusion, images: Tensor) -> Tensor:
    """uint8 (N, C, H, W): of packed latents what the autoencoder makes of them, which then leaves memory again."""
    if not images.is_floating_point():
        return images
    codec = diffusion.codec
    pixels = to_uint8(codec.decode(codec.encode(choose_variant(images, {})[0])))
    codec.release()
    return pixels


def _samples(diffusion, num: int, eta: float) -> Tensor:
    """uint8 (num, C, H, W) on the CPU."""
    batches = diffusion.sample(range(num), timesteps=diffusion.config.training.sample_timesteps, eta=eta)
    return to_uint8(torch.cat([batch.images for batch in batches])).cpu()


def _beside(parts: dict[str, Tensor], columns: int) -> Tensor:
    """Images (N, C, H, W) under their captions, side by side with a gap that is wider than those between images."""
    sheets = [captioned(tile(images, columns), caption) for caption, images in parts.items()]
    gap = sheets[0].new_full((*sheets[0].shape[:2], 4 * GAP), 255)
    return torch.cat([sheets[0], *[piece for sheet in sheets[1:] for piece in (gap, sheet)]], 2)
