"""The typed description of a study: which runs to train alike, when and how to measure them."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from configs.base import AsTuple, Count, Counts, Natural, Positive, Section
from configs.messages import describe
from configs.reading import CONFIG_FOLDER, SIZE_LIMIT, parse_yaml
from configs.sampling import SamplerSettings
from utils.errors import ConfigError, DataError
from utils.files import read_regular

STUDIES = CONFIG_FOLDER / "studies"


def _usable_as_folder(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_+.]*", name):
        raise ValueError(f"name {name!r} must consist of letters, digits, '_', '+' and '.'")
    return name


RunName = Annotated[str, AfterValidator(_usable_as_folder)]
Overrides = dict[str, Any]
MetricName = Literal["fid", "sfid", "kid", "is", "is_blocks", "pr", "digits_fd", "digits_unsure"]
LOWER_IS_BETTER = ("fid", "sfid", "kid", "digits_fd", "digits_unsure")


class Sampler(SamplerSettings):
    """A way to sample, and what it is applied to: one cell for each run, seed, number of images and number of steps.

    Its other keys are those of ``SamplerSettings``.
    """

    timesteps: Annotated[Counts, Field(min_length=1)]
    """Numbers of sampling steps."""
    eps_scaler: Literal["fit"] | Positive | Annotated[tuple[float, float], AsTuple] | None = None
    """Divide the predicted noise by B, or by K i + B; fit: by what diagnose.py fit-eps-scaler finds."""
    gamma: Literal["measure"] | None = None
    """measure, with var_type analytic: Gamma of each network, as diagnose.py gamma measures it at these steps."""
    images_seen: Counts | None = None
    """Measure after so many training images; none: at the end of training only."""
    runs: Annotated[tuple[RunName, ...], AsTuple] | None = None
    """Measure these runs; none: all."""


class Study(Section):
    """A grid of runs that differ in what ``runs`` says and in nothing else, and the cells that are measured."""

    config: str
    """Configuration that all runs share: a file, or a name in configs/."""
    overrides: Overrides = {}
    """Keys of it that are changed for all runs, such as training.global_batch_size: 64."""
    runs: Annotated[dict[RunName, Overrides], Field(min_length=1)]
    """Name of a run: the keys in which it differs from the others, such as loss.lamda: 0."""
    seeds: Annotated[tuple[Natural, ...], AsTuple, Field(min_length=1)] = (1024,)
    """training.seed; every run is trained once with each. Equal seeds: equal first weights, data order and noise."""
    images_seen: Annotated[Counts, Field(min_length=1)]
    """Training images after which weights are kept to be measured, ascending; the last is the budget."""
    samplers: Annotated[tuple[Sampler, ...], AsTuple, Field(min_length=1)]
    """What to measure, the most telling first."""
    num_images: Annotated[int, Field(ge=10)] = 500
    """Generated images in each cell: the number in FID-500."""
    image_seeds: Literal["apart", "shared"] = "apart"
    """Seeds of these images: apart, each training seed s has its own, from s num_images on, so that standard errors
    over training seeds hold the draw of the images, too; shared: 0, 1, ... for all."""
    metrics: Annotated[tuple[MetricName, ...], AsTuple] = ("fid", "pr")
    """Of one feature pass; the report is about the first, one of fid, sfid, kid, digits_fd and digits_unsure."""
    interval: bool = True
    """Give every FID a 95% interval, for so many images of the same weights."""
    fid_stats: str | None = None
    """Reference statistics with features (fid.py ref --cache_features); none: made when missing."""
    reference_images: Annotated[int, Field(ge=10)] | None = None
    """Training images in a reference that is made here, drawn with seed 0; none: all."""
    fit_images: Annotated[int, Field(ge=2)] = 64
    """Real images and chains with which eps_scaler: fit and gamma: measure are found."""
    grid: Count = 16
    """Images of each cell that the report shows, the same seeds for all runs."""

    @model_validator(mode="after")
    def _parts_agree(self):
        if list(self.images_seen) != sorted(set(self.images_seen)):
            raise ValueError(f"images_seen {list(self.images_seen)} must ascend")
        if not self.metrics or self.metrics[0] not in LOWER_IS_BETTER:
            raise ValueError(f"metrics {list(self.metrics)} must begin with what the report is about, one of "
                             f"{', '.join(LOWER_IS_BETTER)}")
        for number, sampler in enumerate(self.samplers):
            for key, known in (("images_seen", self.images_seen), ("runs", self.runs)):
                unknown = set(getattr(sampler, key) or ()) - set(known)
                if unknown:
                    raise ValueError(f"samplers[{number}].{key} names {sorted(unknown)}, which the study's {key} does "
                                     f"not hold: {list(known)}")
        return self


def load_study(path: str | Path) -> Study:
    """Read the YAML of a study: a file, or a name in configs/studies/.

    Raises:
        ConfigError: With the file, the key, what was given and what is allowed.
    """
    path = _find(Path(path))
    try:
        raw = parse_yaml(read_regular(path, 4 * SIZE_LIMIT, "study").decode(), str(path))
    except DataError as error:
        raise ConfigError(str(error)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold the keys of a study: {', '.join(Study.model_fields)}")
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        problems = sorted(error.errors(include_url=False), key=lambda p: p["type"] != "extra_forbidden")
        raise ConfigError(f"{path}: {describe({**problems[0], 'loc': _place(problems[0]['loc'])}, _keys(raw))}") \
            from None


def study_yaml(study: Study) -> str:
    """Text that ``load_study`` reads back to an equal object."""
    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False)


def _find(path: Path) -> Path:
    for candidate in (path, STUDIES / path, STUDIES / f"{path}.yml"):
        if candidate.exists() and not candidate.is_dir():            # a pipe is refused as one
            return candidate
    known = ", ".join(sorted(p.name for p in STUDIES.glob("*.yml")))
    raise ConfigError(f"study {str(path)!r} not found; give a path, or one of configs/studies/: {known}")


def _place(loc: tuple) -> tuple:
    """("samplers", 1, "eta") -> ("samplers[1]", "eta"), which is how ``describe`` takes it."""
    return (f"samplers[{loc[1]}]", *loc[2:]) if loc[:1] == ("samplers",) and len(loc) > 1 else loc


def _keys(raw: dict) -> list[str]:
    count = len(raw["samplers"]) if isinstance(raw.get("samplers"), list) else 0
    return [*Study.model_fields, *(f"samplers[{i}].{key}" for i in range(count) for key in Sampler.model_fields)]
