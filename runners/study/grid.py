"""The cells of a study: which there are, how they are called, and which are measured already."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.sampling import SamplerSettings
from configs.study import Sampler, Study
from utils.atomic import write_text
from utils.errors import DataError
from utils.files import json_object, read_lines


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        run: Name in the study.
        seed: Of its training.
        images_seen: Training images after which its weights are taken.
        settings: What differs from the defaults of ``SamplerSettings``, with the number of steps; ``eps_scaler`` may be
            "fit".
    """

    run: str
    seed: int
    images_seen: int
    settings: dict

    @property
    def doc(self) -> str:
        """Folder of the run."""
        return f"{self.run}-{self.seed}"

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def sampler(self, scaler=None, gamma: str | None = None) -> SamplerSettings:
        """The settings, with ``scaler`` in the place of a fit and the file ``gamma`` in that of a measurement."""
        changes = {"eps_scaler": scaler} if self.fits else {}
        return SamplerSettings(**self.settings | changes | ({"gamma": gamma} if gamma else {}))

    @property
    def fits(self) -> bool:
        """Whether its epsilon scaling is to be fitted."""
        return self.settings.get("eps_scaler") == "fit"

    @property
    def measures_gamma(self) -> bool:
        """Whether the variances are analytic, of a Gamma that is to be measured."""
        return self.settings.get("gamma") == "measure"

    @property
    def label(self) -> str:
        """The sampler in few words, without its number of steps."""
        return self.sampler().label + (", eps scaled (fit)" if self.fits else "")

    def __str__(self) -> str:
        return f"{self.doc} at {self.images_seen:,} images, {self.label}, {self.settings['timesteps']} steps"

    @property
    def file_name(self) -> str:
        words = f"{self.doc} {self.images_seen} {self.label} {self.settings['timesteps']}"
        return "_".join("".join(c if c.isalnum() or c in "+-." else " " for c in words).split())


def cells_of(study: Study) -> list[Cell]:
    """All cells in the order in which they are measured: by sampler, images seen, steps; then the runs side by side."""
    cells = {}
    for sampler in study.samplers:
        for images_seen in sampler.images_seen or study.images_seen[-1:]:
            for steps in sampler.timesteps:
                for seed in study.seeds:
                    for run in sampler.runs or study.runs:
                        cell = Cell(run, seed, images_seen, _settings(sampler, steps))
                        cells.setdefault(cell.key, cell)
    return list(cells.values())


def _settings(sampler: Sampler, steps: int) -> dict:
    kept = sampler.model_dump(mode="json", include=set(SamplerSettings.model_fields), exclude_defaults=True)
    return {**kept, "timesteps": steps}


def read_cells(folder: Path) -> dict[str, dict]:
    """``{Cell.key: line}`` of all FOLDER/RUN.jsonl; a line that a power cut has broken is left out.

    Raises:
        DataError: A line of another kind.
    """
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        for text in read_lines(path):
            entry = json_object(text)
            if entry is None:
                continue
            cell = _cell_of(entry)
            if cell is None:
                raise DataError(f"{path}: holds a line that is no cell of a study; move the file away")
            found[cell.key] = entry
    return found


# What a report reads of a line: numbers that must be there, and those that may be.
NUMBERS = {"seconds", "sampling_seconds", "network_calls"}
OTHER_NUMBERS = {"reference_count", "fid", "precision", "recall", "kid", "inception_score", "inception_score_blocks",
                 "sfid", "digits_fd", "digits_unsure"}


def _cell_of(entry: dict) -> Cell | None:
    """The cell that a line has measured; None: it is none."""
    try:
        cell = Cell(**entry["study"])
    except (KeyError, TypeError):
        return None
    fit, interval = entry.get("fit"), entry.get("fid_interval_95") or (0, 0)
    values = [*(entry.get(key) for key in NUMBERS), *(entry.get(key, 0) for key in OTHER_NUMBERS),
              *(interval if isinstance(interval, list | tuple) and len(interval) == 2 else (None,)),
              fit.get("b") if isinstance(fit, dict) else fit or 0, cell.seed, cell.images_seen]
    texts = cell.run, entry.get("reference_fingerprint")
    whole = (all(type(value) in (int, float) for value in values) and all(isinstance(text, str) for text in texts)
             and isinstance(cell.settings, dict) and "timesteps" in cell.settings)
    return cell if whole else None


def prepare_cells(path: Path) -> None:
    """Make ``path``, of lines, fit for the next one: no half line that it would stick to, no link that leads elsewhere.

    Only for the job that has locked the run. Raises DataError: a link.
    """
    for file in (path, path.with_suffix(".txt")):
        if file.is_symlink():
            raise DataError(f"{file}: is a link, cells are added to a file of its own only; remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        lines = read_lines(path)
        whole = [line for line in lines if line.endswith("\n") and json_object(line) is not None]
        if whole != lines:
            write_text(path, "".join(whole))
