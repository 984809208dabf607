"""Comparisons in pairs: the same seeds of training with and without a remedy, so that what the seed does drops out."""

from collections.abc import Sequence
from math import inf, sqrt
from statistics import mean, stdev
from typing import NamedTuple

# Keys of a sampler that are remedies; without them it is the sampler that it is compared with.
REMEDIES = ("eps_scaler", "dcw", "time_shift", "restart", "churn", "guidance", "guidance_interval")
UNDECIDED = "not distinguishable"


class Difference(NamedTuple):
    """Of a distance, with minus without; below 0 the remedy helps.

    Attributes:
        mean: Over the seeds.
        error: Standard error of it; infinite for one seed.
        half: Half the width of its 95% interval.
    """

    mean: float
    error: float
    half: float

    @property
    def verdict(self) -> str:
        if abs(self.mean) <= self.half:
            return UNDECIDED
        return "helps" if self.mean < 0 else "hurts"


def difference(with_remedy: dict[int, float], without: dict[int, float]) -> Difference | None:
    """From values by seed; None where no seed has both.

    The interval is Student's t over the differences of the seeds, two-sided, uncorrected for the number of comparisons.
    """
    pairs = [with_remedy[seed] - without[seed] for seed in with_remedy.keys() & without.keys()]
    if len(pairs) < 2:
        return Difference(pairs[0], inf, inf) if pairs else None
    from scipy.stats import t

    error = standard_error(pairs)
    return Difference(mean(pairs), error, float(t.ppf(0.975, len(pairs) - 1)) * error)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of at least two values."""
    return stdev(values) / sqrt(len(values))


def without_remedies(settings: dict) -> dict:
    """The same sampler without remedies."""
    analytic = ("var_type", "gamma") if settings.get("var_type") == "analytic" else ()
    return {key: value for key, value in settings.items() if key not in (*REMEDIES, *analytic)}


def in_words(name: str, verdicts: dict[str, str]) -> str:
    """``"SA: helps with 1 of 4 (DDIM in 10 steps), hurts with 1 (Heun in 10 steps), not distinguishable with 2."``."""
    parts = []
    for verdict in ("helps", "hurts", UNDECIDED):
        where = [place for place, found in verdicts.items() if found == verdict]
        if where:
            listed = f" ({'; '.join(where)})" if verdict != UNDECIDED else ""
            parts.append(f"{verdict} with {len(where)}{f' of {len(verdicts)}' if not parts else ''}{listed}")
    return f"{name}: {', '.join(parts)}."
