"""Logged results side by side: a Markdown table and FID against the number of sampling steps."""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.atomic import atomic_path
from utils.errors import DataError

# What makes two results results of one run; seeds, seconds and machine do not.
IDENTITY = ("checkpoint", "weights_fingerprint", "weights_kind", "name", "reference", "reference_fingerprint",
            "preprocess", "amp")


@dataclass(frozen=True)
class Row:
    """One run at one number of steps.

    Attributes:
        run: The settings by name, without the steps.
        steps: Of the sampler; None where the images were not sampled here.
        values: FID of each seed range, in the order of the logs.
    """

    run: dict
    steps: int | None
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)


def read_logs(paths: Sequence[str | Path]) -> list[dict]:
    """Entries with an FID, of all files in order.

    Raises:
        DataError: A missing file, a line that is no JSON object, or no entry at all.
    """
    entries = []
    for path in paths:
        try:
            lines = Path(path).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from None
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line or "{}")
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                raise DataError(f"{path}, line {number}: not a JSON object")
            if isinstance(entry.get("fid"), (int, float)):
                entries.append(entry)
    if not entries:
        raise DataError(f"{', '.join(map(str, paths))}: no entry with an FID")
    return entries


def rows(entries: Sequence[dict]) -> list[Row]:
    """Results that differ only in their seeds become one row; sorted by run, then by steps."""
    groups = defaultdict(dict)
    for entry in entries:
        sampler = dict(entry.get("sampler") or {})
        steps = count_steps(sampler.pop("timesteps", None))
        run = {key: entry[key] for key in IDENTITY if entry.get(key) is not None} | sampler
        key = json.dumps(run, sort_keys=True), -1 if steps is None else steps
        groups[key][str(entry.get("seeds", entry.get("seed")))] = entry["fid"]       # of a repeated range the last
    return [Row(json.loads(run), None if steps < 0 else steps, tuple(fids.values()))
            for (run, steps), fids in sorted(groups.items())]


def count_steps(spec) -> int | None:
    """50, "50", "ddim50" -> 50; "10,15,20" (sections) -> 45."""
    if spec is None:
        return None
    numbers = [int(number) for number in re.findall(r"\d+", str(spec))]
    return sum(numbers) if numbers else None


def table(found: Sequence[Row]) -> str:
    """Markdown: the settings that differ between runs, steps, number of seed ranges, lowest and mean FID."""
    varying = _varying(found)
    columns = [*varying, "steps", "FID", "seed ranges", "min", "mean"]
    lines = [columns, ["---"] * len(columns)]
    for row in found:
        settings = [_short(row.run.get(key)) for key in varying]
        steps = "" if row.steps is None else str(row.steps)
        lines.append([*settings, steps, row.run.get("name", "FID"), str(len(row.values)), f"{min(row.values):.4f}",
                      f"{row.mean:.4f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(found: Sequence[Row], path: str | Path) -> None:
    """FID against steps: one line of means for each run, with the range of seeds as a band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="sampling steps", ylabel="FID")
    varying, runs = _varying(found), defaultdict(list)
    for row in found:
        runs[" ".join(_short(row.run.get(key)) for key in varying) or row.run.get("checkpoint", "run")].append(row)
    for label, group in runs.items():
        steps = [row.steps or 0 for row in group]
        line, = axes.plot(steps, [row.mean for row in group], marker="o", label=label)
        axes.fill_between(steps, [min(row.values) for row in group], [max(row.values) for row in group],
                          color=line.get_color(), alpha=0.2, linewidth=0)
    if all(row.steps for row in found):
        axes.set_xscale("log")
        ticks = sorted({row.steps for row in found})
        axes.set_xticks(ticks, labels=map(str, ticks), minor=False)
        axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _varying(found: Sequence[Row]) -> list[str]:
    """Settings that tell the runs apart, and always the checkpoint."""
    keys = dict.fromkeys(key for row in found for key in row.run)
    return [key for key in keys if key == "checkpoint"
            or (key != "name" and len({json.dumps(row.run.get(key)) for row in found}) > 1)]


def _short(value) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value).replace("|", "/")
