"""The measured cells of a study, grouped for its tables."""

from typing import NamedTuple

from runners.evaluation.metrics import count_name
from runners.study.job import StudyJob
from runners.study.pairs import standard_error
from utils.errors import DataError, UserError

# Numbers of a cell: their names for readers; and of those that a report may be about, digits behind the point.
TITLES = {"fid": "FID", "precision": "precision", "recall": "recall", "kid": "KID",
          "inception_score": "Inception Score", "inception_score_blocks": "Inception Score of blocks", "sfid": "sFID",
          "digits_fd": "digits FD",
          "digits_unsure": "unsure digits"}
DIGITS = {"fid": 1, "sfid": 1, "kid": 4, "digits_fd": 3, "digits_unsure": 3}


class Value(NamedTuple):
    """Mean over the seeds of training, ends of its bar, and how it is written."""

    mean: float
    low: float
    high: float
    text: str


class Findings:
    """``values[(label, steps, images_seen)][run]`` lists the cells of all seeds with their entries.

    Raises:
        UserError: Nothing is measured yet.
        DataError: A cell lacks what the report is about.
    """

    def __init__(self, job: StudyJob):
        found = job.read_cells()
        self.job, self.cells = job, [(cell, found[cell.key]) for cell in job.all_cells if cell.key in found]
        if not self.cells:
            raise UserError(f"{job.folder} holds no measured cell yet")
        self.runs = [run for run in job.study.runs if any(cell.run == run for cell, _ in self.cells)]
        self.headline, self.budget = job.study.metrics[0], job.study.images_seen[-1]
        if not all(self.headline in entry for _, entry in self.cells):
            raise DataError(f"{job.folder / 'cells'}: holds a line without {self.headline}, the study's first metric")
        self.digits = DIGITS[self.headline]
        self.name = count_name(job.study.num_images).replace("FID", TITLES[self.headline])
        self.values: dict[tuple, dict[str, list]] = {}
        for cell, entry in self.cells:
            key = cell.label, cell.settings["timesteps"], cell.images_seen
            self.values.setdefault(key, {}).setdefault(cell.run, []).append((cell, entry))

    @property
    def has_intervals(self) -> bool:
        """Whether what the report is about has an interval somewhere."""
        return any(entry.get(f"{self.headline}_interval_95") for _, entry in self.cells)

    def by_seed(self, key: tuple, run: str) -> dict[int, float]:
        """What the report is about, by seed of training."""
        return {cell.seed: entry[self.headline] for cell, entry in self.values.get(key, {}).get(run, [])}

    def settings(self, key: tuple) -> dict:
        """Of the sampler of these cells."""
        (cell, _), *_ = next(iter(self.values[key].values()))
        return cell.settings

    def value(self, key: tuple, run: str) -> Value | None:
        """With the standard error over several seeds, or for one seed the interval of its images if there is one."""
        found = list(self.by_seed(key, run).values())
        if not found:
            return None
        mean = sum(found) / len(found)
        if len(found) > 1:
            error = standard_error(found)
            return Value(mean, mean - error, mean + error, f"{self.number(mean)} ± {self.number(error)}")
        low, high = self.values[key][run][0][1].get(f"{self.headline}_interval_95") or [mean, mean]
        words = f" ({self.number(low)} to {self.number(high)})" if low < high else ""
        return Value(mean, min(low, mean), max(high, mean), self.number(mean) + words)

    def number(self, value: float, sign: str = "") -> str:
        return f"{value:{sign}.{self.digits}f}"
