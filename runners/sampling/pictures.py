"""Pictures of what the chain does to single images: paths between latents, estimates along the chain, inversion."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.image_dataset import ImageDataset
from datasets.specs import read_any
from functions.ode import ddim_inversion
from functions.pixels import to_uint8
from functions.rng import SeededNoise, slerp
from runners.sampling.sampler import Sampler
from runners.sampling.steps import count_calls
from utils.atomic import write_json
from utils.errors import UserError
from utils.png import save_png, tile


def interpolation_grid(sampler: Sampler, seeds: Sequence[int], columns: int = 11) -> Tensor:
    """DDIM's interpolation: each row runs from one seed's latent to the next one's along the sphere.

    Returns:
        uint8 (C, H', W'), len(seeds) - 1 rows.
    """
    rows, shape = [], (1, *sampler.codec.shape)
    for first, second in zip(seeds, seeds[1:], strict=False):
        a, b = (SeededNoise([seed], sampler.device).randn(shape)[0] for seed in (first, second))
        x = torch.stack([slerp(a, b, i / (columns - 1)) for i in range(columns)])
        same = [first] * columns                                      # with eta > 0 a row shares its later draws too
        noise = SeededNoise(same, sampler.device)
        noise.randn(x.shape)                                          # the latent of the row's first image
        rows.append(to_uint8(sampler.run(x, noise, sampler.condition(same))))
    return tile(torch.cat(rows), columns)


def sequence_grid(sampler: Sampler, seeds: Sequence[int], columns: int = 10) -> Tensor:
    """DDIM's sequence: each row shows the estimates of x0 of one image along the chain, and the sample last.

    Returns:
        uint8 (C, H', W'), one row for each seed.
    """
    shown, total = [], len(sampler.times)
    picks = {round(i * (total - 1) / max(1, columns - 2)) for i in range(columns - 1)}

    def keep(index, t, x, x0, eps):
        if index in picks:
            shown.append(to_uint8(sampler.codec.decode(x0)))

    shown.append(to_uint8(sampler(seeds, keep)))
    return tile(torch.stack(shown, 1).flatten(0, 1), len(shown))


def open_originals(path: str, config) -> ImageDataset:
    """Images of a folder, zip or npz, brought to the size of the configuration."""
    if not Path(path).exists():
        raise UserError(f"--reconstruct {path}: no such folder or file of images")
    reader = read_any(Path(path), config.data, "train")
    return ImageDataset("reconstruct", reader, "resize-center-crop", config.data.shape)


def reconstruct(sampler: Sampler, path: str, originals, indices: Sequence[int], batch_size: int,
                target: Path) -> None:
    """Encode images by the reversed chain and decode them (DDIM, section 5.4).

    Writes ``TARGET_reconstruction.png``, pairs of original and reconstruction, and ``.json`` beside it, whose line is
    also printed: errors for each pixel of images in [0, 1], over all images (``mse`` as in DDIM's table 2) and each.
    """
    codec, settings, pairs = sampler.codec, sampler.settings, []
    up = count_calls(settings, sampler.denoiser.schedule, sampler.denoiser.prediction,
                     lambda denoiser, x: ddim_inversion(denoiser, x, sampler.times))
    for start in range(0, len(indices), batch_size):
        chunk = indices[start:start + batch_size]
        images = torch.from_numpy(np.stack([originals.read(i) for i in chunk])).permute(0, 3, 1, 2)
        x0, condition = codec.encode(images.to(sampler.device)), sampler.condition(chunk)
        latent = ddim_inversion(sampler.conditioned(condition), x0, sampler.times,
                                eps_scaler=settings.eps_scaler)
        decoded = sampler.run(latent, SeededNoise(chunk, sampler.device), condition, start=sampler.times[-1])
        pairs.append(torch.stack([codec.decode(x0), decoded], 1))
    pairs = torch.cat(pairs).cpu()                                          # (N, 2, C, H, W) in [0, 1]
    error = (pairs[:, 1] - pairs[:, 0]).flatten(1)                          # (N, C H W)
    line = {"images": str(path), "indices": list(indices), "sampler": settings.given(),
            "network_calls": up + sampler.calls,
            "mse": error.square().mean().item(), "mean_absolute_error": error.abs().mean().item(),
            "largest_error": error.abs().max().item(), "mse_of_each": error.square().mean(1).tolist()}
    picture = target.with_name(f"{target.name}_reconstruction.png")
    save_png(tile(to_uint8(pairs.flatten(0, 1)), 2 * max(1, round((len(pairs) / 2) ** 0.5))), picture)
    write_json(picture.with_suffix(".json"), line)
    print(json.dumps(line))
    print(picture)
