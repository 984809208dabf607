"""Reference statistics for FID: where they lie, what they may look like, and whether they fit what is measured."""

import hashlib
import json
import logging
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from configs.schema import Config
from datasets.arrays import npz_keys
from datasets.specs import DATASETS
from functions.frechet import covariance_root
from runners.evaluation.outputs import check_output
from runners.evaluation.statistics_files import is_npz, read_features, read_spatial, read_statistics
from utils.atomic import atomic_write
from utils.errors import DataError, UserError, choose
from utils.names import safe_name
from utils.writable import check_writable

log = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parents[2] / "pytorch_fid"
DIM, SPATIAL_DIM = 2048, 2023                              # features of FID and of sFID

NO_DATA_SET = ("ZIP", "FOLDER", "CAPTIONS")                # but kinds of data, of which data.root names one
# (data set or LSUN category, longer side) -> SA-DPM's and EDM's file name. Others: see ``default_name``.
DEFAULT_STATS = {
    ("CIFAR10", 32): "cifar10_train_stat.npy",
    ("CELEBA", 64): "fid_stats_celeba64.npz",
    ("CELEBAHQ", 256): "celebahq_stat.npy",
    ("church_outdoor", 256): "lsun_church_stat.npy",
    ("FFHQ64", 64): "ffhq-64x64.npz",
    ("AFHQ", 64): "afhqv2-64x64.npz",
}


class MissingReference(UserError):
    """No file of statistics where one was looked for; ``--fid_stats auto`` makes it."""


@dataclass
class Reference:
    """What generated images are compared with.

    Attributes:
        mean, cov: float64, (2048,) and (2048, 2048).
        count: Number of images, None where the file does not say.
        name: File name.
        fingerprint: Of mean and covariance, 16 hex digits.
        provenance: What ``fid.py ref`` noted; empty for files of unknown origin.
        path: The file, None for a reference that was just made.
        forced: The user insisted (``--force``), so that mismatches are warnings; None: the command has no such flag.
    """

    mean: np.ndarray
    cov: np.ndarray
    count: int | None = None
    name: str = "reference"
    provenance: dict = field(default_factory=dict)
    path: Path | None = None
    forced: bool | None = None

    @cached_property
    def features(self) -> np.ndarray | None:
        """float32 (N, 2048) if the file has them: KID, precision and recall need them. Read when first asked for."""
        return None if self.path is None else read_features(self.path, DIM, self.count)

    @cached_property
    def spatial(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean (2023,) and covariance of the features of sFID, if the file has them. Read when first asked for."""
        return None if self.path is None else read_spatial(self.path, SPATIAL_DIM)

    @cached_property
    def root(self):
        """``covariance_root`` of the covariance, for many intervals to one reference."""
        return covariance_root(self.cov)

    @property
    def has_images(self) -> bool:
        """Whether the file also holds images (``arr_0``), as guided-diffusion's do."""
        return self.path is not None and is_npz(self.path) and "arr_0" in npz_keys(self.path)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.mean).tobytes()
                              + np.ascontiguousarray(self.cov).tobytes()).hexdigest()[:16]

    def require(self, **expected) -> None:
        """Compare what is expected with the provenance; what the file does not say is not compared.

        Raises:
            UserError: Something differs and the reference was not forced.
        """
        differing = [f"{key} {self.provenance[key]!r} instead of {value!r}" for key, value in expected.items()
                     if key in self.provenance and self.provenance[key] != value]
        if differing and not self.forced:
            other, ways = self.provenance.get("preprocess"), ""
            if self.forced is not None:                    # of a command that has --preprocess and --force
                way = f", give --preprocess {other}" if other != expected.get("preprocess", other) else ""
                ways = f"{way}, or insist with --force"
            raise UserError(f"reference {self.name} was made with {', '.join(differing)}; make the right one with "
                            f"fid.py ref{ways}")
        if differing:
            log.warning("reference %s was made with %s: the FID has no usual meaning", self.name, ", ".join(differing))

    def save(self, path: str | Path) -> None:
        """Write pytorch-fid's npz (``mu``, ``sigma``) with the provenance, guided-diffusion's statistics of sFID
        (``mu_s``, ``sigma_s``) and the features, as far as there are any."""
        arrays = {"mu": self.mean, "sigma": self.cov, "provenance": np.array(json.dumps(self.provenance))}
        if self.spatial is not None:
            arrays["mu_s"], arrays["sigma_s"] = self.spatial
        if self.features is not None:
            arrays["features"] = self.features
        atomic_write(path, lambda file: np.savez(file, **arrays))


def config_provenance(config: Config) -> dict:
    """The parts of a configuration that decide what the images of a reference look like."""
    data = config.data
    return {"dataset": data.dataset, "category": data.category, "image_size": [data.height, data.width],
            "channels": data.channels, "transform": choose(DATASETS, data.dataset, "data.dataset").transform}


def default_name(config: Config, preprocess: str = "pytorch-fid") -> str:
    """SA-DPM's file name for a data set, else ``dataset-HxW.npz``; other preprocessing is part of the name, and for
    kinds of data that are no data set (folders, zips) what the folder or file is called.

    Raises:
        UserError: ``data.category``, which becomes part of the name, is no name.
    """
    data = config.data
    if data.category:
        safe_name("data.category", data.category, one_part=True)
    own = [re.sub(r"[^\w.+-]", "_", Path(data.root).stem)] if data.dataset in NO_DATA_SET and data.root else []
    plain = "-".join([data.dataset.lower(), *own, *([data.category] if data.category else []),
                      f"{data.height}x{data.width}"])
    if preprocess != "pytorch-fid":
        return f"{plain}-{preprocess}.npz"
    return DEFAULT_STATS.get((data.category or data.dataset, max(data.height, data.width)), f"{plain}.npz")


def default_path(config: Config, preprocess: str = "pytorch-fid") -> Path:
    """Where the reference that ``config`` names (or else the default one) is made, if it is missing.

    Raises:
        UserError: A name that leads out of pytorch_fid/ and the working folder.
    """
    if config.sampling.fid_stats:
        safe_name("a missing reference is made below this folder only, fid.py ref --out makes it elsewhere: "
                  "sampling.fid_stats", config.sampling.fid_stats)
    wanted = Path(config.sampling.fid_stats or default_name(config, preprocess)).with_suffix(".npz")
    return FOLDER / wanted if wanted.parent == Path() else wanted


def find_reference(config: Config | None = None, stats: str | Path | None = None, preprocess: str = "pytorch-fid",
                   force: bool | None = None, source: Sequence[str] = ()) -> Reference:
    """Locate, load and check the statistics to compare with.

    Args:
        config: What the images are like; None skips that comparison.
        stats: A file, or a name in pytorch_fid/; None: ``sampling.fid_stats``, else the default of the data set.
        preprocess: The preprocessing of the features it will be compared with.
        force: Mismatches become warnings; None: refused, and the caller has no flag for it.
        source: What tells fid.py ref of the same images, see ``source_words``, for the command in the message.

    Raises:
        MissingReference: No such file; the message has the command that makes it.
        UserError: A reference that was made for something else.
        DataError: The file is broken.
    """
    given = stats or (config and config.sampling.fid_stats)
    if not given and config is None:
        raise UserError("no FID reference given: name a file of statistics")
    wanted = Path(given or default_name(config, preprocess))
    candidates = [FOLDER / wanted, FOLDER / wanted.with_suffix(".npz")]
    if given:                                              # a .npy that is absent may have been made again as .npz
        candidates = [wanted, wanted.with_suffix(".npz"), *candidates]
    path = next((each for each in candidates if each.exists() and not each.is_dir()), None)       # a pipe is told so
    if path is None:
        where = ", ".join(str(candidate) for candidate in dict.fromkeys(candidates))
        raise MissingReference(
            f"FID reference {wanted} not found (looked for {where}); make it with: "
            f"{reference_command(source, wanted, preprocess)}")
    reference = load_reference(path)
    reference.forced = force
    if "weights" not in reference.provenance:
        unknown = "" if "preprocess" in reference.provenance else f" and preprocessing ({preprocess} here)"
        log.warning("reference %s does not say how it was made: data set, transform%s cannot be compared",
                    reference.name, unknown)
    reference.require(preprocess=preprocess, **(config_provenance(config) if config else {}))
    return reference


def source_words(config: str | Path | None, exp: str | Path = "exp", overrides: Sequence[str] = ()) -> list[str]:
    """Flags with which fid.py ref describes the data set of another command.

    Args:
        config: What that command calls its configuration; None: it came with the weights.
        exp: Its folder of runs and data sets.
        overrides: ``"section.key=value"``.
    """
    if config is None:
        return []
    return ["--config", str(config), *(["--exp", str(exp)] if str(exp) != "exp" else []),
            *(f"--{override}" for override in overrides)]


def reference_command(source: Sequence[str], wanted: Path, preprocess: str) -> str:
    """The command that makes a missing reference."""
    out = FOLDER.name / wanted.with_suffix(".npz") if wanted.parent == Path() else wanted.with_suffix(".npz")
    more = [] if preprocess == "pytorch-fid" else ["--preprocess", preprocess]
    return shlex.join(["python", "fid.py", "ref", *(source or ["--images", "FOLDER"]), "--out", str(out), *more])


def load_reference(path: str | Path) -> Reference:
    """Read a file of statistics; ``statistics_files.read_statistics`` says which formats there are.

    Raises:
        DataError: Broken, of another dimension, not finite, or asking for code.
    """
    path = Path(path)
    found = read_statistics(path, DIM)
    return Reference(found["mean"], found["cov"], found["count"], path.name, found["provenance"], path)


def check_target(path: str | Path, flag: str, overwrite: bool = False, inputs: Sequence[str | Path] = ()) -> None:
    """Refuse to write a reference over an input, or over a file that is no reference of ours; see ``check_output``."""
    check_output(path, flag, inputs=inputs, ours=_is_ours, overwrite=overwrite)
    check_writable(path, flag)


def _is_ours(path: Path) -> bool:
    try:
        return {"mu", "sigma", "provenance"} <= {*npz_keys(path)}
    except DataError:
        return False
