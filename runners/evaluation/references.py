"""Reference statistics for FID: where they lie, what they may look like, and whether they fit what is measured."""

import hashlib
import json
import logging
import zipfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from configs.schema import Config
from datasets.specs import DATASETS
from utils.atomic import atomic_write
from utils.errors import DataError, UserError, choose
from utils.safe_load import load_pickle

log = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parents[2] / "pytorch_fid"
DIM = 2048

# (data set or LSUN category, longer side) -> SA-DPM's and EDM's file name. Others: see ``default_name``.
DEFAULT_STATS = {
    ("CIFAR10", 32): "cifar10_train_stat.npy",
    ("CELEBA", 64): "fid_stats_celeba64.npz",
    ("CELEBAHQ", 256): "celebahq_stat.npy",
    ("church_outdoor", 256): "lsun_church_stat.npy",
    ("FFHQ64", 64): "ffhq-64x64.npz",
    ("AFHQ", 64): "afhqv2-64x64.npz",
}
MEAN_KEYS, COV_KEYS = ("mu", "mean", "m"), ("sigma", "cov", "s")


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
        forced: The user insisted (``--force``), so that mismatches are warnings.
    """

    mean: np.ndarray
    cov: np.ndarray
    count: int | None = None
    name: str = "reference"
    provenance: dict = field(default_factory=dict)
    path: Path | None = None
    forced: bool = False

    @cached_property
    def features(self) -> np.ndarray | None:
        """float32 (N, 2048) if the file has them: KID, precision and recall need them. Read when first asked for.

        Raises:
            DataError: They are of another shape.
        """
        if self.path is None or not zipfile.is_zipfile(self.path):
            return None
        with np.load(self.path, allow_pickle=False) as archive:
            features = archive["features"] if "features" in archive.files else None
        if features is not None and (features.ndim != 2 or features.shape[1] != DIM):
            raise DataError(f"{self.path}: features of shape {features.shape}, (N, {DIM}) expected")
        return features

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
            raise UserError(f"reference {self.name} was made with {', '.join(differing)}; make the right one with "
                            "fid.py ref, or insist with --force")
        if differing:
            log.warning("reference %s was made with %s: the FID has no usual meaning", self.name, ", ".join(differing))

    def save(self, path: str | Path) -> None:
        """Write pytorch-fid's npz (``mu``, ``sigma``) with the provenance, and the features if there are any."""
        arrays = {"mu": self.mean, "sigma": self.cov, "provenance": np.array(json.dumps(self.provenance))}
        if self.features is not None:
            arrays["features"] = self.features
        atomic_write(path, lambda file: np.savez(file, **arrays))


def config_provenance(config: Config) -> dict:
    """The parts of a configuration that decide what the images of a reference look like."""
    data = config.data
    return {"dataset": data.dataset, "category": data.category, "image_size": [data.height, data.width],
            "channels": data.channels, "transform": choose(DATASETS, data.dataset, "data.dataset").transform}


def default_name(config: Config, preprocess: str = "pytorch-fid") -> str:
    """SA-DPM's file name for a data set, else ``dataset-HxW.npz``; other preprocessing is part of the name."""
    data = config.data
    plain = "-".join([data.dataset.lower(), *([data.category] if data.category else []), f"{data.height}x{data.width}"])
    if preprocess != "pytorch-fid":
        return f"{plain}-{preprocess}.npz"
    return DEFAULT_STATS.get((data.category or data.dataset, max(data.height, data.width)), f"{plain}.npz")


def default_path(config: Config, preprocess: str = "pytorch-fid") -> Path:
    """Where the reference that ``config`` names (or else the default one) is made, if it is missing."""
    wanted = Path(config.sampling.fid_stats or default_name(config, preprocess)).with_suffix(".npz")
    return FOLDER / wanted if wanted.parent == Path() else wanted


def find_reference(config: Config | None = None, stats: str | Path | None = None, preprocess: str = "pytorch-fid",
                   force: bool = False, config_name: str | None = None) -> Reference:
    """Locate, load and check the statistics to compare with.

    Args:
        config: What the images are like; None skips that comparison.
        stats: A file, or a name in pytorch_fid/; None: ``sampling.fid_stats``, else the default of the data set.
        preprocess: The preprocessing of the features it will be compared with.
        force: Mismatches become warnings.
        config_name: How the user calls the configuration, for the command in the message.

    Raises:
        MissingReference: No such file; the message has the command that makes it.
        UserError: A reference that was made for something else.
        DataError: The file is broken.
    """
    given = stats or (config and config.sampling.fid_stats)
    if not given and config is None:
        raise UserError("no FID reference given: name a file of statistics")
    wanted = Path(given or default_name(config, preprocess))
    candidates = [wanted, FOLDER / wanted, FOLDER / wanted.with_suffix(".npz")] if given else \
        [FOLDER / wanted, FOLDER / wanted.with_suffix(".npz")]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        where = ", ".join(str(candidate) for candidate in dict.fromkeys(candidates))
        raise MissingReference(
            f"FID reference {wanted} not found (looked for {where}); make it with: "
            f"{reference_command(config, wanted, config_name, preprocess)}")
    reference = load_reference(path)
    reference.forced = force
    if not reference.provenance:
        log.warning("reference %s does not say how it was made: data set, transform and preprocessing (%s here) cannot "
                    "be compared", reference.name, preprocess)
    reference.require(preprocess=preprocess, **(config_provenance(config) if config else {}))
    return reference


def reference_command(config: Config | None, wanted: Path, config_name: str | None, preprocess: str) -> str:
    """The command that makes a missing reference."""
    out = FOLDER.name / wanted.with_suffix(".npz") if wanted.parent == Path() else wanted.with_suffix(".npz")
    source = f"--config {config_name or config.data.dataset.lower() + '.yml'}" if config else "--images FOLDER"
    more = "" if preprocess == "pytorch-fid" else f" --preprocess {preprocess}"
    return f"python fid.py ref {source} --out {out}{more}"


def load_reference(path: str | Path) -> Reference:
    """Read an npz with mu and sigma (pytorch-fid, EDM, guided-diffusion, ours) or a pickled dict (SA-DPM's .npy).

    Raises:
        DataError: Broken, of another dimension, not finite, or asking for code.
    """
    path = Path(path)
    values = _read_npz(path) if zipfile.is_zipfile(path) else _read_pickle(path)
    mean = next((values[key] for key in MEAN_KEYS if key in values), None)
    cov = next((values[key] for key in COV_KEYS if key in values), None)
    if mean is None or cov is None:
        hint = f"; it holds images: python fid.py ref --images {path} --out FILE.npz" if "arr_0" in values else ""
        raise DataError(f"{path}: no statistics: keys {MEAN_KEYS[0]} and {COV_KEYS[0]} expected, "
                        f"found {', '.join(sorted(values)) or 'none'}{hint}")
    try:
        mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
        provenance = json.loads(str(values.get("provenance", "{}")))
    except (TypeError, ValueError):
        raise DataError(f"{path}: mu, sigma or provenance are not what they should be") from None
    _check(path, mean, cov)
    return Reference(mean, cov, provenance.get("count"), path.name, provenance, path)


def holds_images(path: str | Path) -> bool:
    """Whether a path is a set of images (folder, zip, array) rather than statistics."""
    path = Path(path)
    if path.suffix == ".npz" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return not {f"{key}.npy" for key in MEAN_KEYS} & set(archive.namelist())
    return path.is_dir() or path.suffix == ".zip"


def _check(path: Path, mean: np.ndarray, cov: np.ndarray) -> None:
    if mean.shape != (DIM,) or cov.shape != (DIM, DIM):
        raise DataError(f"{path}: mu {mean.shape} and sigma {cov.shape} given, ({DIM},) and ({DIM}, {DIM}) expected: "
                        f"statistics of another network or layer")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise DataError(f"{path}: mu or sigma hold values that are not finite")
    if not np.allclose(cov, cov.T, rtol=1e-3, atol=1e-6 * np.abs(cov).max()) or (np.diagonal(cov) < 0).any():
        raise DataError(f"{path}: sigma is no covariance: not symmetric, or with a negative variance")


def _read_npz(path: Path) -> dict:
    """Arrays by key; images and features stay unread."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: None if key in ("arr_0", "features") else archive[key] for key in archive.files}
    except Exception as error:                    # numpy raises ValueError, BadZipFile, EOFError, zlib.error, ...
        raise DataError(f"{path}: not readable as npz: {error}") from None


def _read_pickle(path: Path) -> dict:
    values = load_pickle(path)
    if not isinstance(values, dict):
        raise DataError(f"{path}: a dictionary with mu and sigma expected, found {type(values).__name__}")
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in values.items()}
