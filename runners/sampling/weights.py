"""Files of weights that a request names: where they lie, and the configuration that some of them bring."""

import difflib
import hashlib
import re
import shutil
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import torch

from configs.schema import Config, load_config, validate, with_overrides
from models import stored_settings
from runners.training.checkpoint import RunFolder, refuse_differences
from utils.atomic import atomic_write
from utils.errors import UserError

# What must agree between such a file and a configuration that is given beside it; the schedule may be another.
DECIDE_A_NETWORK = {"model": None, "diffusion": ("prediction", "sigma_data", "beta_d", "beta_min")}


def local_weights(text: str) -> Path:
    """A path as it is; of a URL the file in torch's cache, fetched if it is not there yet. Each URL has a folder of its
    own there: many files of weights are called alike, and their names count for their readers.

    Raises:
        UserError: It cannot be fetched; says where a file from elsewhere is to be put.
    """
    if not re.match(r"https?://", text):
        return Path(text)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text.partition("?")[0].rpartition("/")[2])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    target = Path(torch.hub.get_dir()) / "checkpoints" / digest / (name or "weights")
    if not target.is_file():
        try:
            with urllib.request.urlopen(text, timeout=20) as response:  # noqa: S310
                atomic_write(target, lambda file: shutil.copyfileobj(response, file))
        except (OSError, ValueError) as error:
            raise UserError(f"--weights {text}: cannot be fetched ({error}); fetch it elsewhere and name the file, or "
                            f"put it at {target}") from None
    return target


def epoch_of(config: Config, given: int | None) -> int | None:
    """--ckpt_id, else the configuration's; None: the newest."""
    return config.sampling.ckpt_id if given is None else given


def stored_config(path: Path, overrides: Sequence[str] = ()) -> Config | None:
    """The configuration that a file of weights brings itself, or None.

    Raises:
        DataError: A broken file, or a network that cannot be rebuilt here. ConfigError: An impossible override.
    """
    settings = stored_settings(path) if path.is_file() else None
    if settings is None:
        return None
    settings["data"] = {"dataset": "ZIP", "random_flip": False, **settings["data"]}
    return validate(with_overrides(settings, overrides), str(path))


def configuration_of(run: RunFolder, config: str | None, overrides: Sequence[str], file: Path | None) -> Config:
    """The configuration of a request: --config, else the run's own, else what the file of weights brings.

    Args:
        run: Its own configuration must not be contradicted, unless other weights are named.
        config: A file or name.
        file: Weights that were named, or None.

    Raises:
        UserError: There is none, or two that contradict each other.
    """
    stored = stored_config(file, overrides) if file else None
    given = config or (run.config if run.config.exists() else None)
    if not (given or stored):
        if file and not file.exists():
            raise UserError(f"--weights {file}: no such file")
        runs = [path.parent.name for path in sorted(run.path.parent.glob("*/config.yml"))]
        close = difflib.get_close_matches(run.path.name, runs, n=1)
        hint = f"; {file} brings none" if file else f"; did you mean --doc {close[0]}?" if close else ""
        raise UserError(f"no configuration: {run.config} does not exist, and --config is not given{hint}")
    chosen = load_config(given, overrides) if given else stored
    if stored and given:
        refuse_differences(stored, chosen, file, DECIDE_A_NETWORK, "")
    if run.config.exists() and not file:
        refuse_differences(load_config(run.config), chosen, run.config)
    return chosen
