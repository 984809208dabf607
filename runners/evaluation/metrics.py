"""FID and its companions from one pass over the images: on any number of ranks, from memory, a folder, a zip or an npz.

    evaluation = Evaluation(find_reference(config), load_inception(device=device))
    evaluation.update(images, indices)        # on each rank, its share; uint8 (B, C, H, W)
    evaluation.results()                      # {"fid": ..., "name": "FID-50k", ...}, the same on every rank
"""

import json
import logging
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import Config
from functions import metrics as formulas
from functions.frechet import FeatureStats, frechet_distance
from models.inception import FeatureNet
from runners.distributed import gather_objects, on_rank_zero, rank, world_size
from runners.evaluation.image_pass import DatasetSource, FileSource, choose_subset, evaluate_images
from runners.evaluation.references import (
    MissingReference,
    Reference,
    default_name,
    default_path,
    find_reference,
    holds_images,
    load_reference,
)
from utils.errors import UserError, choose

__all__ = ["Collector", "DatasetSource", "Evaluation", "FileSource", "MissingReference", "Reference", "append_log",
           "choose_subset", "count_name", "default_name", "evaluate_images", "find_reference", "holds_images",
           "load_reference", "make_reference", "summary"]

log = logging.getLogger(__name__)


class Collector:
    """Feature statistics of the images that this and the other ranks have seen.

    Args:
        net: Makes the features.
        keep_features: Keep every feature vector (8 KiB for each image), not only sums.
    """

    def __init__(self, net: FeatureNet, keep_features: bool = False):
        self.net, self.keep_features = net, keep_features
        self.stats = FeatureStats(net.dim)
        self.features: list[Tensor] = []                     # of (B, 2048) float32 on the CPU
        self.indices: list[int] = []

    def update(self, images: Tensor, indices: Sequence[int]) -> None:
        """Add this rank's images, uint8 (B, C, H, W), and their places in the whole set."""
        if len(images):
            self.add(self.net(images), indices)

    def add(self, features: Tensor, indices: Sequence[int]) -> None:
        """Add features that are there already, (B, 2048)."""
        if len(features) != len(indices):
            raise ValueError(f"{len(features)} images, but {len(indices)} indices")
        self.stats.update(features)
        if self.keep_features:
            self.features.append(features.float().cpu())
            self.indices += [int(i) for i in indices]

    def gather(self) -> tuple[FeatureStats, np.ndarray | None, np.ndarray | None]:
        """Statistics, features (N, 2048) and indices (N,) ascending, of all ranks on every rank. Collective."""
        whole = FeatureStats(self.net.dim)
        whole.count = sum(gather_objects(self.stats.count))
        whole.total, whole.outer = _sum_over_ranks(self.stats.total), _sum_over_ranks(self.stats.outer)
        if not self.keep_features:
            return whole, None, None
        own = torch.cat(self.features).numpy() if self.features else np.empty((0, self.net.dim), np.float32)
        shares = gather_objects((self.indices, own))
        indices = np.concatenate([np.asarray(share, np.int64) for share, _ in shares])
        order = np.argsort(indices, kind="stable")
        return whole, np.concatenate([features for _, features in shares])[order], indices[order]


def _sum_over_ranks(value: Tensor) -> Tensor:
    value = value.cpu().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


# ---- metrics: (statistics, features, reference, net) -> entries of the results

def _fid(stats, features, reference, net) -> dict:
    sets = [(stats.mean, stats.cov), (reference.mean, reference.cov)]
    if (reference.count or stats.count) < stats.count:
        sets.reverse()                                       # the smaller set first: less rounding
    return {"fid": frechet_distance(*sets[0], *sets[1])}


def _kid(stats, features, reference, net) -> dict:
    value = formulas.kid(reference.features, features)
    return {"kid": value.mean, "kid_std": value.std, "kid_std_error": value.std_error}


def _precision_recall(stats, features, reference, net) -> dict:
    on_device = [torch.as_tensor(each).to(net.device) for each in (reference.features, features)]
    precision, recall = formulas.precision_recall(*on_device)
    return {"precision": precision, "recall": recall}


def _inception_score(stats, features, reference, net) -> dict:
    score = formulas.inception_score(net.logits(torch.as_tensor(features).to(net.device)).cpu())
    return {"inception_score": score.mean, "inception_score_std": score.std}


METRICS = {"fid": _fid, "kid": _kid, "is": _inception_score, "pr": _precision_recall}
MINIMUM = {"fid": 2, "kid": 2, "is": 10, "pr": 4}                # images


class Evaluation:
    """One feature pass compared with a reference.

    Args:
        reference: From ``find_reference``.
        net: From ``load_inception``; its preprocessing and weights must be the reference's.
        metrics: Names in ``METRICS``.
        keep_features: Keep all features although no metric needs them.
        bootstrap: Resamples for a 95% interval of the FID; 0: none.

    Raises:
        UserError: Unknown metric, a reference made with other weights or preprocessing, or one without what a metric
            needs.
    """

    def __init__(self, reference: Reference, net: FeatureNet, metrics: Sequence[str] = ("fid",),
                 keep_features: bool = False, bootstrap: int = 0):
        for name in metrics:
            choose(METRICS, name, "metric")
        reference.require(preprocess=net.preprocess, weights=net.fingerprint)
        if "is" in metrics:
            net.logits(torch.zeros(1, net.dim))
        if {"kid", "pr"} & set(metrics) and reference.features is None:
            raise UserError(f"kid and pr need the features of the reference, which {reference.name} does not hold; "
                            "make it with fid.py ref --cache_features")
        self.reference, self.net, self.metrics, self.bootstrap = reference, net, tuple(metrics), bootstrap
        self.collector = Collector(net, keep_features or bootstrap > 0 or any(name != "fid" for name in metrics))
        self.update, self.add = self.collector.update, self.collector.add

    def results(self) -> dict:
        """All numbers and what they are, the same on every rank; every rank must call it.

        Raises:
            UserError: Too few images for a metric.
        """
        stats, features, _ = self.collector.gather()
        for name in self.metrics:
            if stats.count < MINIMUM[name]:
                raise UserError(f"{stats.count} image(s) given, {name} needs at least {MINIMUM[name]}")
        if stats.count < self.net.dim and rank() == 0:
            log.warning("%d images are fewer than %d dimensions: the covariance is singular and FID biased upwards",
                        stats.count, self.net.dim)
        return on_rank_zero(lambda: self._compute(stats, features))

    def _compute(self, stats: FeatureStats, features) -> dict:
        numbers = {}
        for name in self.metrics:
            numbers |= METRICS[name](stats, features, self.reference, self.net)
        if self.bootstrap and "fid" in numbers:
            interval = formulas.bootstrap_interval(features, self.reference.mean, self.reference.cov,
                                                   resamples=self.bootstrap)
            numbers |= {"fid_interval_95": list(interval), "bootstrap": self.bootstrap}
        return {**numbers, "name": count_name(stats.count), "num_images": stats.count,
                "reference": self.reference.name, "reference_fingerprint": self.reference.fingerprint,
                "reference_count": self.reference.count, "preprocess": self.net.preprocess,
                "inception_fingerprint": self.net.fingerprint, "inception_source": self.net.source}


def make_reference(images, net: FeatureNet, out: str | Path | None = None, *, root=None, num: int | None = None,
                   seed: int = 0, batch_size: int = 64, keep_features: bool = False) -> Reference:
    """Statistics of images, with a note of how they were made. Collective over ranks.

    Args:
        images: A ``Config`` (its training images through the training transform, unflipped) or a ``FileSource``.
        out: File to write, npz; None: the default place of a ``Config``, nothing for a ``FileSource``.
        root: Where the data set lies, see ``datasets.packed.open_images``.
        num: Size of a random subset drawn with ``seed``; None: all images.
        keep_features: Keep the features too, for KID, precision and recall.

    Raises:
        UserError: Fewer images than ``num``.
        DataError: Unreadable images, or images of several sizes.
    """
    source = images
    if isinstance(images, Config):
        source = DatasetSource(images, root)
        out = out or default_path(images, net.preprocess)
    indices = choose_subset(len(source), num, seed, source.name)
    if len(indices) < 2:
        raise UserError(f"{source.name}: {len(indices)} image(s); statistics need at least 2")
    collector = Collector(net, keep_features)
    evaluate_images(source, collector, batch_size, indices=indices)
    stats, features, _ = collector.gather()
    provenance = {**source.provenance, "count": stats.count, "total": len(source), "preprocess": net.preprocess,
                  "weights": net.fingerprint, "weights_source": net.source, "versions": versions()}
    if num is not None:
        provenance["subset_seed"] = seed
    reference = Reference(stats.mean, stats.cov, stats.count, Path(out).name if out else source.name, provenance)
    reference.features = features
    if out:
        on_rank_zero(lambda: reference.save(out))
    return reference


# ---- what is written down

def count_name(num_images: int) -> str:
    """50000 -> "FID-50k", 1797 -> "FID-1797": the count is part of an FID's name."""
    return f"FID-{num_images // 1000}k" if num_images % 1000 == 0 else f"FID-{num_images}"


def summary(results: dict) -> str:
    """The numbers, one on a line, for people."""
    lines = [f"{results['name'] if key == 'fid' else key:20} {value:.6g}" for key, value in results.items()
             if isinstance(value, float)]
    if "fid_interval_95" in results:
        lines.append("{:20} {:.6g} to {:.6g}".format("95% interval", *results["fid_interval_95"]))
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Of everything whose change could move a digit."""
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "pytorch-fid", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def append_log(fid_log: str | Path, checkpoint_path: str | Path, results: dict, details: dict) -> None:
    """Append SA-DPM's line to ``fid_log`` and one JSON object to the same path with suffix .jsonl; rank 0 only.

    Args:
        checkpoint_path: Its last two parts name the run and the weights in the line.
        results: Of ``Evaluation.results``.
        details: How the images were made: whatever is needed to make them again.
    """
    if rank() > 0:
        return
    fid_log, checkpoint = Path(fid_log), "/".join(Path(checkpoint_path).parts[-2:])
    device = details.get("device", "cpu")
    entry = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "checkpoint": checkpoint, **details, **results,
             "world_size": world_size(), "threads": torch.get_num_threads(), "versions": versions(),
             "machine": torch.cuda.get_device_name(device) if str(device).startswith("cuda") else platform.machine()}
    fid_log.parent.mkdir(parents=True, exist_ok=True)
    if "fid" in results:
        _append(fid_log, f"Checkpoint {checkpoint}  --> FID {results['fid']}\n")
    _append(fid_log.with_suffix(".jsonl"), json.dumps(entry) + "\n")


def _append(path: Path, line: str) -> None:
    """In one write, so that lines of concurrent jobs do not mix."""
    with open(path, "a") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
