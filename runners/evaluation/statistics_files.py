"""Files of reference statistics as programs publish them, read as data: known arrays only, of the right size."""

import json
import zipfile
from pathlib import Path

import numpy as np

from datasets.arrays import npz_array, npz_keys
from utils.errors import DataError
from utils.files import open_regular
from utils.safe_load import load_pickle

MEAN_KEYS, COV_KEYS = ("mu", "mean", "m"), ("sigma", "cov", "s")


def is_npz(path: str | Path) -> bool:
    """Whether a file is a zip archive, as npz files are. Raises DataError for what is no file, such as a pipe."""
    with open_regular(path) as file:
        return zipfile.is_zipfile(file)


def holds_images(path: str | Path) -> bool:
    """Whether a path is a set of images (folder, zip, array) rather than statistics.

    Raises:
        DataError: A broken npz.
    """
    path = Path(path)
    if path.suffix == ".npz" and path.is_file():
        return not {*MEAN_KEYS} & {*npz_keys(path)}
    return path.is_dir() or path.suffix == ".zip"


def read_statistics(path: Path, dim: int) -> dict:
    """Mean, covariance, and what the file says about itself.

    Formats: npz with ``mu, sigma`` (pytorch-fid, EDM, ours) and also ``mu_s, sigma_s`` (guided-diffusion); a pickled
    dictionary of the two (SA-DPM's .npy); EDM2's pickle ``{num_images, fid: {mu, sigma}, ...}``.

    Returns:
        ``mean`` (dim,) and ``cov`` (dim, dim) in float64, ``provenance`` (a dictionary; empty where the origin is
        not known), ``count`` (None where the file does not say).

    Raises:
        DataError: Broken, of another dimension, not finite, or asking for code.
    """
    return _read_npz(path, dim) if is_npz(path) else _read_pickle(path, dim)


def read_spatial(path: Path, dim: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean (dim,) and covariance of sFID's features, None where the file has none."""
    if not is_npz(path) or not {"mu_s", "sigma_s"} <= {*npz_keys(path)}:
        return None
    names = ("mu_s", "sigma_s")
    return check_moments(path, *(_array(path, name, dim) for name in names), dim, names)


def read_features(path: Path, dim: int, count: int | None) -> np.ndarray | None:
    """float32 (N, dim), None where the file has none.

    Raises:
        DataError: Of another shape or type, not finite, or another number of them than the file claims.
    """
    if not is_npz(path) or "features" not in npz_keys(path):
        return None
    features = npz_array(path, "features")
    if features.ndim != 2 or features.shape[1] != dim or features.dtype.kind != "f" or not len(features):
        raise DataError(f"{path}: features {features.dtype} {features.shape}, float (N, {dim}) expected")
    if count is not None and len(features) != count:
        raise DataError(f"{path}: {len(features)} features, but statistics of {count} images")
    features = np.array(features, np.float32)                       # a copy: the file may be replaced meanwhile
    if not np.isfinite(features).all():
        raise DataError(f"{path}: features hold values that are not finite")
    return features


def _read_npz(path: Path, dim: int) -> dict:
    keys = npz_keys(path)
    names = [next((key for key in known if key in keys), None) for known in (MEAN_KEYS, COV_KEYS)]
    if None in names:
        hint = f"; it holds images: python fid.py ref --images {path} --out FILE.npz" if "arr_0" in keys else ""
        raise DataError(f"{path}: no statistics: keys {MEAN_KEYS[0]} and {COV_KEYS[0]} expected, "
                        f"found {', '.join(sorted(keys)) or 'none'}{hint}")
    mean, cov = check_moments(path, *(_array(path, name, dim) for name in names), dim)
    if "provenance" in keys:
        provenance = _provenance(path, str(npz_array(path, "provenance")))
    elif "mu_s" in keys:                      # guided-diffusion's evaluator, which resizes as TensorFlow 1 does
        provenance = {"format": "guided-diffusion", "preprocess": "tf1"}
    else:
        provenance = {}
    return {"mean": mean, "cov": cov, "provenance": provenance, "count": provenance.get("count")}


def _read_pickle(path: Path, dim: int) -> dict:
    values = load_pickle(path)
    if not isinstance(values, dict):
        raise DataError(f"{path}: a dictionary with mu and sigma expected, found {type(values).__name__}")
    values = _named(values)
    provenance, count = {}, None
    if isinstance(values.get("fid"), dict):                             # EDM2, whose detector resizes as TensorFlow 1
        provenance, count = {"format": "EDM2", "preprocess": "tf1"}, values.get("num_images")
        values = _named(values["fid"])
        if count is not None and (not isinstance(count, int | np.integer) or count < 2):
            raise DataError(f"{path}: num_images {str(count)[:40]!r}, a whole number from 2 expected")
    elif "fd_dinov2" in values:
        raise DataError(f"{path}: holds no statistics of Inception, only fd_dinov2")
    found = [next((values[key] for key in known if key in values), None) for known in (MEAN_KEYS, COV_KEYS)]
    if any(value is None for value in found):
        raise DataError(f"{path}: no statistics: keys mu and sigma expected, "
                        f"found {', '.join(sorted(values)) or 'none'}")
    mean, cov = check_moments(path, *found, dim)
    return {"mean": mean, "cov": cov, "provenance": provenance, "count": None if count is None else int(count)}


def _named(values: dict) -> dict:
    """Python 2 has bytes for names."""
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in values.items()}


def _array(path: Path, key: str, dim: int) -> np.ndarray:
    array = npz_array(path, key)
    if array.size > dim * dim:                                          # checked before it is copied
        raise DataError(f"{path}: {key} {array.shape} given: statistics of another network or layer")
    return np.array(array)


def _provenance(path: Path, text: str) -> dict:
    """What ``fid.py ref`` noted; a count that is there is one."""
    try:
        found = json.loads(text)
        count = found.get("count", 2)
        if type(count) is not int or count < 2:
            raise ValueError
    except (AttributeError, ValueError, RecursionError):
        raise DataError(f"{path}: provenance is not what fid.py ref writes") from None
    return found


def check_moments(path: Path, mean, cov, dim: int, names=("mu", "sigma")) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 (dim,) and (dim, dim). Raises DataError where they are no mean and no covariance."""
    try:
        if np.iscomplexobj(mean) or np.iscomplexobj(cov):
            raise TypeError
        mean, cov = np.array(mean, np.float64), np.array(cov, np.float64)       # pickles give read-only ones
    except (TypeError, ValueError):
        raise DataError(f"{path}: {' or '.join(names)} are not numbers") from None
    if mean.shape != (dim,) or cov.shape != (dim, dim):
        raise DataError(f"{path}: {names[0]} {mean.shape} and {names[1]} {cov.shape} given, ({dim},) and "
                        f"({dim}, {dim}) expected: statistics of another network or layer")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise DataError(f"{path}: {names[0]} or {names[1]} hold values that are not finite")
    if not np.allclose(cov, cov.T, rtol=1e-3, atol=1e-6 * np.abs(cov).max()) or (np.diagonal(cov) < 0).any():
        raise DataError(f"{path}: {names[1]} is no covariance: not symmetric, or with a negative variance")
    return mean, cov
