"""Logged results side by side: a Markdown table and FID against the number of sampling steps."""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.atomic import atomic_path
from utils.errors import DataError
from utils.files import MIB, json_object, open_regular, read_regular
from utils.text import escape_control

# What makes two results results of one run; seeds, seconds and machine do not. The last two parts of a path are not
# enough to tell runs apart: "origin" is the fingerprint of the weights, or the whole path of the images.
IDENTITY = ("checkpoint", "origin", "weights_kind", "name", "reference", "reference_fingerprint", "preprocess", "amp",
            "guide", "classifier", "prompts", "negative_prompt", "ema_length")
COMPARABLE = ("name", "reference", "reference_fingerprint", "preprocess")        # numbers of one axis share these
CODES = {"origin": "checkpoint", "reference_fingerprint": "reference"}           # shown only where the name repeats
LARGEST = 64 * MIB                                                               # of a log
MARK = "sa-ddim fid.py compare"                                                  # in our pictures
COLUMNS = ["steps", "FID", "seed ranges", "min", "mean"]


@dataclass(frozen=True)
class Row:
    """One run at one number of steps.

    Attributes:
        run: The settings by name, without the steps where they are a plain number.
        steps: Of the sampler, in all; None where the images were not sampled here.
        values: FID of each seed range, in the order of the logs.
    """

    run: dict
    steps: int | None
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def axis(self) -> tuple:
        """Rows with the same may be drawn against each other."""
        return tuple(self.run.get(key) for key in COMPARABLE)


def read_logs(paths: Sequence[str | Path]) -> list[dict]:
    """Entries with an FID, of all files in order.

    Raises:
        DataError: A missing file, a line that is no JSON object or no result, or no entry at all.
    """
    entries = []
    for path in paths:
        try:
            lines = read_regular(path, LARGEST, "log").decode().splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: cannot be read: {error}") from None
        beside = Path(path).with_suffix(".jsonl")                 # --fid_log fid.txt: SA-DPM's lines, objects beside
        hint = f"; did you mean {beside}?" if beside != Path(path) and beside.exists() else ""
        for number, line in enumerate(lines, 1):
            entry = _parse(line, f"{path}, line {number}", hint)
            if "fid" in entry:
                entries.append(entry)
    if not entries:
        raise DataError(f"{', '.join(map(str, paths))}: no entry with an FID")
    return entries


def _parse(line: str, where: str, hint: str) -> dict:
    entry = json_object(line.strip() or "{}")
    if entry is None:
        raise DataError(f"{where}: not a JSON object{hint}")
    fid = entry.get("fid", 0.0)
    if isinstance(fid, bool) or not isinstance(fid, int | float) or not abs(fid) <= sys.float_info.max:
        raise DataError(f"{where}: fid is {str(fid)[:40]!r}, no finite number")
    if not isinstance(entry.get("sampler") or {}, dict):
        raise DataError(f"{where}: sampler is not an object")
    return entry


def rows(entries: Sequence[dict]) -> list[Row]:
    """Results that differ only in their seeds become one row; sorted by run, then by steps."""
    groups = defaultdict(dict)
    for entry in entries:
        sampler = dict(entry.get("sampler") or {})
        spec = sampler.pop("timesteps", None)
        steps = count_steps(spec)
        if steps is not None and not str(spec).isdecimal():     # ddim50 or 10,15,20: other times than 50 or 45 have
            sampler["timesteps"] = re.sub(r"^ddim\d+$", "ddimN", str(spec))
        origin = next((entry[key] for key in ("weights_fingerprint", "images", "weights") if entry.get(key)), None)
        named = {**entry, "origin": origin}
        run = {key: named[key] for key in IDENTITY if named.get(key) is not None} | sampler
        key = json.dumps(run, sort_keys=True), -1 if steps is None else steps
        seeds = [entry.get(key) for key in (("seeds",) if "seeds" in entry else ("num", "seed", "subset_rule"))]
        groups[key][json.dumps(seeds)] = entry["fid"]                                # of a repeated range the last
    return [Row(json.loads(run), None if steps < 0 else steps, tuple(fids.values()))
            for (run, steps), fids in sorted(groups.items())]


def count_steps(spec) -> int | None:
    """50, "50", "ddim50" -> 50; "10,15,20" (sections) -> 45."""
    if spec is None:
        return None
    numbers = [int(number) for number in re.findall(r"\d{1,9}", str(spec)[:1000])]
    return sum(numbers) if numbers else None


def table(found: Sequence[Row]) -> str:
    """Markdown: the settings that differ between runs, steps, number of seed ranges, lowest and mean FID."""
    varying = _varying(found)
    lines = [[*varying, *COLUMNS], ["---"] * (len(varying) + len(COLUMNS))]
    for row in found:
        settings = [_short(row.run.get(key)) for key in varying]
        steps = "" if row.steps is None else str(row.steps)
        lines.append([*settings, steps, _short(row.run.get("name", "FID")), str(len(row.values)),
                      f"{min(row.values):.4f}", f"{row.mean:.4f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def is_table(path: Path) -> bool:
    """Whether a file begins like a table of ours, so that it may be replaced."""
    with open_regular(path) as file:
        return file.read(1 << 16).split(b"\n")[0].endswith(f"| {' | '.join(COLUMNS)} |".encode())


def is_plot(path: Path) -> bool:
    """Whether a file is a picture of ours, so that it may be replaced."""
    with open_regular(path) as file:
        return MARK.encode() in file.read(1 << 12)


def plot(found: Sequence[Row], path: str | Path) -> None:
    """FID against steps: one line of means for each run, with the range of seeds as a band.

    Numbers that must not be compared (another number of images, reference or resize) get a panel of their own.
    """
    from matplotlib.figure import Figure

    panels = defaultdict(list)
    for row in found:
        panels[row.axis].append(row)
    figure = Figure(figsize=(7, 4.5 * len(panels)), layout="constrained")
    for axes, group in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.values(), strict=True):
        _draw(axes, group, len(panels) > 1)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png", metadata={"Software": MARK})


def _draw(axes, found: Sequence[Row], titled: bool) -> None:
    run = found[0].run
    axes.set(xlabel="sampling steps", ylabel=_short(run.get("name", "FID")))
    if titled or run.get("reference"):
        axes.set_title(f"against {_short(run.get('reference', 'an unnamed reference'))}, "
                       f"{_short(run.get('preprocess', 'unknown'))} resize", fontsize="medium")
    varying, runs = _varying(found), defaultdict(list)
    for row in found:
        runs[tuple(_legend(key, row.run.get(key)) for key in varying if key in row.run)].append(row)
    for label, group in runs.items():
        steps = [row.steps or 0 for row in group]
        line, = axes.plot(steps, [row.mean for row in group], marker="o", label=", ".join(label) or "run")
        axes.fill_between(steps, [min(row.values) for row in group], [max(row.values) for row in group],
                          color=line.get_color(), alpha=0.2, linewidth=0)
    if all(row.steps for row in found):
        axes.set_xscale("log")
        ticks = sorted({row.steps for row in found})
        axes.set_xticks(ticks, labels=map(str, ticks), minor=False)
        axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _varying(found: Sequence[Row]) -> list[str]:
    """Settings that tell the runs apart, and always the checkpoint; a fingerprint only where its name does not."""
    def distinct(*keys) -> int:
        return len({json.dumps([row.run.get(key) for key in keys]) for row in found})

    keys = dict.fromkeys(key for row in found for key in row.run)
    return [key for key in keys if key == "checkpoint"
            or (key != "name" and distinct(key) > 1
                and (key not in CODES or distinct(key, CODES[key]) > distinct(CODES[key])))]


def _legend(key: str, value) -> str:
    """The path of a checkpoint speaks for itself, "0" does not."""
    return _short(value) if key in ("checkpoint", "origin", "reference", "sample_type") else f"{key} {_short(value)}"


def _short(value) -> str:
    text = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return escape_control(text.replace("|", "/"))
