"""Classes of images: from EDM's ``dataset.json``, from folders, from file names."""

import json
import math
from collections.abc import Callable

import numpy as np

from utils.errors import DataError, UserError

MAX_CLASSES = 1 << 20
LABELS = "dataset.json"


def class_labels(labels: np.ndarray) -> np.ndarray:
    """int64 (N,) of either kind of labels: -1 where they are vectors."""
    return labels if labels.ndim == 1 else no_labels(len(labels))


def no_labels(count: int) -> np.ndarray:
    """int64 (count,), all -1."""
    return np.full(count, -1, np.int64)


def top_folders(names: list[str]) -> list[str]:
    """Sorted folders that come first in the names; empty where an image lies outside of all."""
    folders = {name.partition("/")[0] for name in names if "/" in name}
    return sorted(folders) if all("/" in name for name in names) else []


def folder_labels(where: str, names: list[str]) -> np.ndarray:
    """The top-level folder of each image, numbered in alphabetical order: EDM's tool.

    Raises:
        DataError: Fewer than two such folders, or images beside them.
    """
    folders = top_folders(names)
    if len(folders) < 2:
        found = f"one, {folders[0]}/" if folders else "images that lie in none"
        raise DataError(f"{where}: data.labels folders needs at least two folders that hold all images; it has {found}")
    return _numbered([name.partition("/")[0] for name in names], where)


def filename_labels(where: str, names: list[str]) -> np.ndarray:
    """The text before the first "_" of each file name, numbered in alphabetical order: guided-diffusion and DDPM-IP."""
    files = [name.rpartition("/")[2] for name in names]
    if odd := next((name for name, file in zip(names, files, strict=True) if "_" not in file), None):
        raise DataError(f"{where}/{odd}: data.labels filenames takes the text before the first '_' of a file name as "
                        "its class, and this one has none")
    return _numbered([file.partition("_")[0] for file in files], where)


def auto_labels(where: str, names: list[str]) -> np.ndarray:
    """What EDM's tool does where there is no ``dataset.json``: folders, if at least two of them hold all images."""
    return folder_labels(where, names) if len(top_folders(names)) > 1 else no_labels(len(names))


# data.labels: what it means for files without a dataset.json (which auto prefers); "json" is for sets whose folders
# are no classes.
FILE_RULES: dict[str, Callable[[str, list[str]], np.ndarray]] = {
    "auto": auto_labels, "folders": folder_labels, "filenames": filename_labels,
    "none": lambda where, names: no_labels(len(names)), "json": lambda where, names: no_labels(len(names))}


def file_rule(rule: str) -> str:
    """``rule``, or a UserError that names those of ``data.labels``."""
    if rule not in FILE_RULES:
        raise UserError(f"data.labels {rule!r} is unknown; known: {', '.join(sorted(FILE_RULES.keys() - {'json'}))}")
    return rule


def _numbered(classes: list[str], where: str) -> np.ndarray:
    known = {name: number for number, name in enumerate(sorted(set(classes)))}
    if len(known) > MAX_CLASSES:
        raise DataError(f"{where}: {len(known):,} classes, at most {MAX_CLASSES:,} are possible")
    return np.array([known[name] for name in classes], np.int64).reshape(-1)


def read_labels(text: bytes, where: str, names: list[str]) -> np.ndarray:
    """Labels of ``names`` from the text of a ``dataset.json``: ``{"labels": [["00000/img.png", 6], ...] or null}``.

    Returns:
        int64 (N,), -1 for all where labels are null; float32 (N, D) where they are lists of numbers.

    Raises:
        DataError: Not of that form, the labelled names are not exactly ``names``, or an odd label.
    """
    try:
        entries = json.loads(text)["labels"]
        labels = {str(name).replace("\\", "/"): label for name, label in entries or ()}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f'{where}: must be {{"labels": [[name, number], ...]}}') from None
    if not labels:
        return no_labels(len(names))
    if odd := set(names) ^ set(labels):
        problem = "labels an image that is not there," if min(odd) in labels else "has no label for"
        raise DataError(f"{where}: {problem} {min(odd)} ({len(odd)} names disagree)")
    values = [labels[name] for name in names]
    vectors = isinstance(values[0], list)
    for name, value in zip(names, values, strict=True):
        if not (_is_vector(value, len(values[0])) if vectors else is_class(value)):
            wanted = f"lists of {len(values[0])} finite numbers" if vectors else f"whole numbers below {MAX_CLASSES:,}"
            raise DataError(f"{where}: the label of {name} is {str(value)[:40]}; all must be {wanted}")
    return np.array(values, np.float32 if vectors else np.int64)


def is_class(value) -> bool:
    """Whether it is the number of a class; -1 is none."""
    return type(value) is int and -1 <= value < MAX_CLASSES


def _is_vector(value, length: int) -> bool:
    return isinstance(value, list) and len(value) == length > 0 and all(
        type(x) in (int, float) and math.isfinite(x) and abs(x) < 1e30 for x in value)


def class_array(labels, where: str) -> np.ndarray:
    """int64 (n,) from whatever an array file calls labels. Raises DataError where these are not classes."""
    array = np.asarray(labels)
    if array.dtype.kind not in "iu" or array.ndim != 1 or (len(array) and not (
            -1 <= int(array.min()) <= int(array.max()) < MAX_CLASSES)):
        raise DataError(f"{where}: labels must be whole numbers from 0 to {MAX_CLASSES - 1:,}, one for each image")
    return array.astype(np.int64)
