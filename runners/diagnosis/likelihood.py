"""Negative log likelihood of real images in bits per dimension, step by step: sharded, and resumed batch by batch."""

import hashlib
import json
import logging
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.arrays import npz_array
from functions.variational import bound_terms, prior_bits
from runners import distributed
from runners.diagnosis.measures import LIKELIHOOD, Diagnosis
from utils.atomic import atomic_write
from utils.errors import DataError, UserError

log = logging.getLogger(__name__)
COLUMNS = ("bits", "x0_mse", "eps_mse")                    # of each step, as in ``functions.variational.BoundTerms``
PUBLISHED = {"vb_terms": "bits", "xstart_mse_terms": "x0_mse", "mse_terms": "eps_mse"}      # guided-diffusion's files


def check_likelihood(config) -> None:
    """UserError where a configuration's images have no likelihood that could be measured here."""
    data = config.data
    if config.diffusion.schedule != "discrete":
        raise UserError("nll needs a chain of steps that starts from N(0, 1): diffusion.schedule discrete")
    if not data.rescaled or data.uniform_dequantization or data.gaussian_dequantization:
        raise UserError("nll measures the 256 levels of pixels in [-1, 1]; it needs data.rescaled, no dequantization")
    if config.model.latent:
        raise UserError(f"nll measures the 256 levels of pixels; {config.model.pretrained} diffuses an autoencoder's "
                        "latents, which have none")


def likelihood(diagnosis: Diagnosis, beside: Path) -> tuple[list[dict], dict]:
    """The terms of the variational bound. Collective; each rank takes its share of the batches.

    Args:
        diagnosis: Whose images, steps, variance and clipping count.
        beside: Finished batches are kept as ``{beside}.{digest}.parts/``, where a later call finds them, until all are
            there; the folder must be visible to all ranks.

    Returns:
        A row for each step, lowest noise first: L_k and the errors of x0' and eps', means over images with standard
        errors. And ``bits_per_dim``, its standard error and ``prior_bits``.
    """
    folder = beside.with_name(f"{beside.name}.{digest(diagnosis)}.parts")
    starts = range(0, len(diagnosis.chosen), diagnosis.batch_size)
    open_ones = [(start, places) for start, places in diagnosis.share if not part(folder, start).exists()]
    if len(open_ones) < len(diagnosis.share):
        log.info("%d of %d batches are there already", len(diagnosis.share) - len(open_ones), len(diagnosis.share))
    for places, x0 in diagnosis.real_images("likelihood", open_ones):
        measured = measure(diagnosis, x0, places)
        atomic_write(part(folder, places[0]), lambda file, measured=measured: np.savez(file, **measured), durable=False)
    distributed.barrier()
    found = distributed.on_rank_zero(lambda: merged([part(folder, start) for start in starts], diagnosis.steps))
    distributed.on_rank_zero(lambda: shutil.rmtree(folder))
    return found


def digest(diagnosis: Diagnosis) -> str:
    """8 hex digits of all that decides the numbers of a batch."""
    diffusion = diagnosis.diffusion
    sections = diagnosis.settings, diffusion.config.model, diffusion.config.diffusion
    about = [diffusion.weights.fingerprint, diagnosis.images.fingerprint, diagnosis.seed, len(diagnosis.chosen),
             diagnosis.batch_size, *(section.model_dump(mode="json") for section in sections)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]


def part(folder: Path, start: int) -> Path:
    return folder / f"{start:06d}.npz"


def measure(diagnosis: Diagnosis, x0: Tensor, places: list[int]) -> dict[str, np.ndarray]:
    """Sums over the images of a batch, (3, S) each, lowest noise first; and each image's total and prior, (B,)."""
    settings, noise = diagnosis.settings, diagnosis.noise(LIKELIHOOD, places)
    denoiser = diagnosis.sampler.conditioned(diagnosis.condition(places))
    terms = bound_terms(denoiser, x0, diagnosis.steps, noise_fn=lambda _: noise.randn(x0.shape),
                        var_type=settings.var_type, clip_denoised=settings.clip)
    total = prior = prior_bits(diagnosis.schedule, x0, diagnosis.steps[-1]).double()
    sums, squares = [], []
    for term in terms:
        values = torch.stack(term).double()                                                  # (3, B)
        sums.append(values.sum(1))
        squares.append(values.square().sum(1))
        total = total + values[0]
    return {"sums": torch.stack(sums[::-1], 1).cpu().numpy(), "squares": torch.stack(squares[::-1], 1).cpu().numpy(),
            "total": total.cpu().numpy(), "prior": prior.cpu().numpy()}


def merged(parts: list[Path], steps: list) -> tuple[list[dict], dict]:
    """Rows and summary of ``likelihood`` from the files of all batches, in their order."""
    sums = squares = 0.0
    totals, priors = [], []
    for path in parts:
        stored = _read_part(path, len(steps))
        sums, squares = sums + stored["sums"], squares + stored["squares"]
        totals.append(stored["total"])
        priors.append(stored["prior"])
    totals, priors = np.concatenate(totals), np.concatenate(priors)
    n = len(totals)
    means = sums / n                                                                         # (3, S)
    errors = np.sqrt(np.maximum(squares / n - means**2, 0) / max(1, n - 1))
    rows = [{"t": t, **{key: value for name, mean, error in zip(COLUMNS, means[:, i], errors[:, i], strict=True)
                        for key, value in ((name, float(mean)), (f"{name}_error", float(error)))}}
            for i, t in enumerate(steps)]
    return rows, {"bits_per_dim": float(totals.mean()), "standard_error": float(totals.std(ddof=1) / n**0.5),
                  "prior_bits": float(priors.mean()), "num_images": n}


def _read_part(path: Path, steps: int) -> dict[str, np.ndarray]:
    """What ``measure`` has given. DataError: damaged."""
    try:
        arrays = {key: npz_array(path, key) for key in ("sums", "squares", "total", "prior")}
        shapes = [array.shape for array in arrays.values()]
        if shapes[:2] != [(len(COLUMNS), steps)] * 2 or shapes[2] != shapes[3] or len(shapes[2]) != 1 or any(
                array.dtype != np.float64 for array in arrays.values()):
            raise DataError(f"arrays {', '.join(map(str, shapes))}, not of {steps} steps")
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise DataError("its CRC-32 is another")
        return arrays
    except (DataError, RuntimeError) as error:             # RuntimeError: a bit says that it is encrypted
        raise DataError(f"{path}: not readable: {error}; remove it and start again") from None


def write_published(rows: list[dict], folder: Path) -> None:
    """guided-diffusion's vb_terms.npz, mse_terms.npz and xstart_mse_terms.npz: arr_0, from the noisiest step down."""
    for name, column in PUBLISHED.items():
        values = np.array([row[column] for row in rows[::-1]])
        atomic_write(folder / f"{name}.npz", lambda file, values=values: np.savez(file, values))
