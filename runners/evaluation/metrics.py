"""FID and its companions from one pass over the images: on any number of ranks, from memory, a folder, a zip or an npz.

    evaluation = Evaluation(find_reference(config), load_inception(device=device))
    evaluation.update(images, indices)        # on each rank, its share; uint8 (B, C, H, W)
    evaluation.results()                      # {"fid": ..., "name": "FID-50k", ...}, the same on every rank
"""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from configs.schema import Config
from functions import metrics as formulas
from functions.fid_interval import frechet_interval
from functions.frechet import frechet_distance
from models.inception import FeatureNet
from runners.distributed import on_rank_zero, rank
from runners.evaluation.collector import Collector, Measured
from runners.evaluation.digits import digits_distance, digits_unsure, require_digits
from runners.evaluation.image_pass import DatasetSource, FileSource, choose_subset, evaluate_images, save_features
from runners.evaluation.logs import append_log, count_name, summary, versions
from runners.evaluation.references import (
    MissingReference,
    Reference,
    check_target,
    default_name,
    default_path,
    find_reference,
    load_reference,
)
from runners.evaluation.statistics_files import holds_images
from utils.errors import UserError, choose

__all__ = ["METRICS", "Collector", "DatasetSource", "Evaluation", "FileSource", "MissingReference", "Reference",
           "append_log", "choose_subset", "complete_reference", "count_name", "default_name", "evaluate_images",
           "find_reference", "holds_images", "load_reference", "make_reference", "needs", "save_features", "summary"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metric:
    """How a number comes about.

    Attributes:
        compute: (what was measured by space, reference, evaluation) -> entries of the results.
        minimum: Images that it needs.
        spaces: Whose statistics it reads.
        features: Whether it reads the features themselves, of the images ("own") and of the reference ("both").
        require: (reference, net) -> None; UserError where it cannot be computed, before any image.
    """

    compute: Callable[[dict[str, Measured], Reference, "Evaluation"], dict]
    minimum: int = 2
    spaces: tuple[str, ...] = ("pool",)
    features: str = ""
    require: Callable[[Reference, FeatureNet], None] = lambda reference, net: None


def _distance(measured: Measured, mean, cov, count: int | None) -> float:
    sets = [(measured.stats.mean, measured.stats.cov), (mean, cov)]
    if (count or measured.stats.count) < measured.stats.count:
        sets.reverse()                                       # the smaller set first: less rounding
    return frechet_distance(*sets[0], *sets[1])


def _fid(measured, reference, evaluation) -> dict:
    found = {"fid": _distance(measured["pool"], reference.mean, reference.cov, reference.count)}
    if evaluation.interval:
        interval = frechet_interval(measured["pool"].features, reference.mean, root=reference.root)
        found["fid_interval_95"] = interval and list(interval)
    return found


def _sfid(measured, reference, evaluation) -> dict:
    return {"sfid": _distance(measured["spatial"], *reference.spatial, reference.count)}


def _kid(measured, reference, evaluation) -> dict:
    value = formulas.kid(reference.features, measured["pool"].features)
    return {"kid": value.mean, "kid_std": value.std, "kid_std_error": value.std_error}


def _precision_recall(measured, reference, evaluation) -> dict:
    sets = [torch.as_tensor(each).to(evaluation.net.device) for each in (reference.features, measured["pool"].features)]
    precision, recall = formulas.precision_recall(*sets)
    return {"precision": precision, "recall": recall}


def _inception_score(measured, reference, evaluation) -> dict:
    score = formulas.inception_score(evaluation.logits(measured))
    return {"inception_score": score.mean, "inception_score_std": score.std}


def _inception_score_of_blocks(measured, reference, evaluation) -> dict:
    score = formulas.inception_score_of_blocks(evaluation.logits(measured))
    return {"inception_score_blocks": score.mean, "inception_score_blocks_std": score.std}


def _require_spatial(reference, net) -> None:
    if reference.spatial is None:
        raise UserError(f"sfid needs the spatial statistics (mu_s, sigma_s) of the reference, which {reference.name} "
                        "does not hold; make it with fid.py ref")


def _require_features(reference, net, name: str = "kid", least: int = 2) -> None:
    if reference.features is None:
        raise UserError(f"kid and pr need the features of the reference, which {reference.name} does not hold; "
                        "make it with fid.py ref --cache_features")
    if len(reference.features) < least:
        raise UserError(f"reference {reference.name} holds the features of {len(reference.features)} image(s); {name} "
                        f"needs at least {least}")


def _require_classifier(reference, net) -> None:
    net.logits(torch.zeros(1, net.dim))


METRICS = {
    "fid": Metric(_fid),
    "sfid": Metric(_sfid, spaces=("spatial",), require=_require_spatial),
    "kid": Metric(_kid, minimum=4, features="both", require=_require_features),
    "is": Metric(_inception_score, minimum=10, features="own", require=_require_classifier),
    "is_blocks": Metric(_inception_score_of_blocks, features="own", require=_require_classifier),
    "pr": Metric(_precision_recall, minimum=4, features="both", require=partial(_require_features, name="pr", least=4)),
    "digits_fd": Metric(digits_distance, spaces=("digits",), require=require_digits),
    "digits_unsure": Metric(digits_unsure, minimum=1, spaces=("digits",), require=require_digits),
}


def needs(metrics: Collection[str]) -> dict:
    """Arguments of ``make_reference`` for a reference that serves these metrics."""
    return {"keep_features": any(METRICS[name].features == "both" for name in metrics), "spatial": "sfid" in metrics}


class Evaluation:
    """One feature pass compared with a reference.

    Args:
        reference: From ``find_reference``.
        net: From ``load_inception``; its preprocessing and weights must be the reference's.
        metrics: Names in ``METRICS``.
        interval: Give FID a 95% interval: of the expectation of the FID of so many images, see
            ``functions.fid_interval``; null where there is none.

    Raises:
        UserError: Unknown metric, a reference made with other weights or preprocessing, or one without what a metric
            needs.
    """

    def __init__(self, reference: Reference, net: FeatureNet, metrics: Sequence[str] = ("fid",),
                 interval: bool = False):
        chosen = [choose(METRICS, name, "metric") for name in metrics]
        reference.require(preprocess=net.preprocess, weights=net.fingerprint)
        for metric in chosen:
            metric.require(reference, net)
        self.reference, self.net, self.metrics = reference, net, tuple(metrics)
        self.interval = interval and "fid" in metrics
        keep = self.interval or any(metric.features for metric in chosen)
        self.collector = Collector(net, keep, {space for metric in chosen for space in metric.spaces})
        self.update = self.collector.update

    def results(self) -> dict:
        """All numbers and what they are, the same on every rank; every rank must call it.

        Raises:
            UserError: Too few images for a metric.
        """
        measured, _ = self.collector.gather()
        count = next(iter(measured.values())).stats.count
        for name in self.metrics:
            if count < METRICS[name].minimum:
                raise UserError(f"{count} image(s) given, {name} needs at least {METRICS[name].minimum}")
        if count < self.net.dim and {"fid", "sfid"} & set(self.metrics) and rank() == 0:
            log.warning("%d images are fewer than %d dimensions: the covariance is singular and FID biased upwards",
                        count, self.net.dim)
        return on_rank_zero(lambda: self._compute(measured, count))

    def logits(self, measured: dict[str, Measured]):
        """(N, 1008) on the CPU."""
        return self.net.logits(torch.as_tensor(measured["pool"].features).to(self.net.device)).cpu()

    def _compute(self, measured: dict[str, Measured], count: int) -> dict:
        numbers = {}
        for name in self.metrics:
            numbers |= METRICS[name].compute(measured, self.reference, self)
        return {**numbers, "name": count_name(count), "num_images": count,
                "reference": self.reference.name, "reference_fingerprint": self.reference.fingerprint,
                "reference_count": self.reference.count, "preprocess": self.net.preprocess,
                "inception_fingerprint": self.net.fingerprint, "inception_source": self.net.source}


def make_reference(images, net: FeatureNet, out: str | Path | None = None, *, root=None, num: int | None = None,
                   seed: int = 0, rule: str = "default", batch_size: int = 64, keep_features: bool = False,
                   spatial: bool = False, overwrite: bool = False) -> Reference:
    """Statistics of images, with a note of how they were made. Collective over ranks.

    Args:
        images: A ``Config`` (its training images through the training transform, unflipped) or a ``FileSource``.
        out: File to write, npz; None: the default place of a ``Config``, nothing for a ``FileSource``.
        root: Where the data set lies, see ``datasets.packed.open_images``.
        num: Size of a random subset drawn with ``seed``; None: all images.
        rule: How it is drawn, see ``choose_subset``.
        keep_features: Keep the features too, for KID, precision and recall.
        spatial: Also the statistics of sFID.
        overwrite: Replace a file that is no reference of ours.

    Raises:
        UserError: Fewer images than ``num``, or ``out`` is someone else's file.
        DataError: Unreadable images, or images of several sizes.
    """
    source = images
    if isinstance(images, Config):
        out = out or default_path(images, net.preprocess)
    if out:
        on_rank_zero(lambda: check_target(out, "reference", overwrite))
    if isinstance(images, Config):
        source = DatasetSource(images, root)
    indices = choose_subset(len(source), num, seed, source.name, rule)
    if len(indices) < 2:
        raise UserError(f"{source.name}: {len(indices)} image(s); statistics need at least 2")
    collector = Collector(net, keep_features, ("pool", "spatial") if spatial else ("pool",))
    evaluate_images(source, collector, batch_size, indices=indices)
    measured, _ = collector.gather()
    stats = measured["pool"].stats
    provenance = {**source.provenance, "count": stats.count, "total": len(source), "preprocess": net.preprocess,
                  "weights": net.fingerprint, "weights_source": net.source, "versions": versions()}
    if num is not None:
        provenance |= {"subset_seed": seed, "subset_rule": rule}
    reference = Reference(stats.mean, stats.cov, stats.count, Path(out).name if out else source.name, provenance)
    reference.features = measured["pool"].features
    reference.spatial = (measured["spatial"].stats.mean, measured["spatial"].stats.cov) if spatial else None
    if out:
        on_rank_zero(lambda: reference.save(out))
    return reference


def complete_reference(reference: Reference, net: FeatureNet, metrics: Sequence[str], batch_size: int = 64) -> None:
    """Features for KID, precision and recall from the images in the file of statistics, where it has images: those of
    guided-diffusion's authors hold 10,000 for the purpose. Collective."""
    if not needs(metrics)["keep_features"] or reference.features is not None or not reference.has_images:
        return
    collector = Collector(net, keep_features=True)
    evaluate_images(FileSource(reference.path), collector, batch_size)
    reference.features = collector.gather()[0]["pool"].features
