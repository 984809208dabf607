"""The file that analytic variances are sampled with: Gamma_t of a network and how it was measured."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from functions.analytic import Gamma
from utils.atomic import write_json
from utils.errors import DataError, UserError

FORMAT = "gamma 1"
MADE_BY = "it is written by diagnose.py gamma"


class GammaFile(NamedTuple):
    gamma: Gamma
    weights: str                 # fingerprint of the network that was measured
    fingerprint: str             # of the file's numbers


def write_gamma(path: Path, rows: list[dict], diffusion, provenance: dict) -> None:
    """Keep Gamma_t of ``diffusion`` (columns ``t``, ``training`` and ``training_error`` of ``rows``)."""
    section = diffusion.config.diffusion
    linear = section.schedule == "discrete" and section.betas is None and section.beta_schedule in LINEAR
    write_json(path, {
        "format": FORMAT, "times": [row["t"] for row in rows], "gamma": [row["training"] for row in rows],
        "standard_error": [row["training_error"] for row in rows],
        "pixels": None if not diffusion.codec.bounded else 2 if linear else 1,
        "weights": diffusion.weights.fingerprint, "diffusion": section.model_dump(mode="json"), **provenance})


LINEAR = ("linear", "adm_linear")              # whose last noise Analytic-DPM bounds by two grey levels instead of one


def read_gamma(path: str | Path) -> GammaFile:
    """What ``write_gamma`` has kept.

    Raises:
        UserError: No such file. DataError: One of another kind.
    """
    path = Path(path)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"--gamma {path}: cannot be read ({error.strerror}); {MADE_BY}") from None
    try:
        stored = json.loads(text)
        if stored["format"] != FORMAT:
            raise ValueError(stored["format"])
        numbers = {key: stored[key] for key in ("times", "gamma", "pixels")}
        gamma = Gamma(numbers["times"], numbers["gamma"], numbers["pixels"])
        fingerprint = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:16]
        return GammaFile(gamma, str(stored["weights"]), fingerprint)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"--gamma {path}: not a file of Gamma ({error}); {MADE_BY}") from None
