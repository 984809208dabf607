"""What a study found, complete or not: tables, curves and sample grids, as report.md and report.html."""

from math import ceil
from pathlib import Path

from runners.diagnosis.curves import PALETTE
from runners.study.comparisons import compared
from runners.study.findings import TITLES, Findings
from runners.study.job import StudyJob
from runners.study.page import Gallery, Heading, Picture, Table, Text, to_html, to_markdown
from runners.training.metrics_file import read_metrics
from utils.atomic import atomic_path, write_text

BARS = "bars: intervals, or standard errors over several seeds"
SEEDS = {"apart": "of the same seeds for all runs of a training seed, and others for the next",
         "shared": "the same seeds in every cell"}
IN_COLUMNS = {"loss.num_consecutive_steps", "loss.lamda", "loss.input_perturbation"}


def write_report(job: StudyJob) -> list[Path]:
    """Write report.md, report.html and figures of the cells measured so far; returns the paths of the two.

    Raises:
        UserError: Nothing is measured yet.
    """
    findings, title = Findings(job), f"Study {job.name}"
    blocks = [*introduction(findings), *runs_table(findings), *steps_part(findings), *compared(findings),
              *images_part(findings), *precision_part(findings), *grids_part(findings), *cells_part(findings)]
    markdown, page = job.folder / "report.md", job.folder / "report.html"
    write_text(markdown, to_markdown(title, blocks, job.folder))
    write_text(page, to_html(title, blocks))
    return [markdown, page]


def introduction(findings: Findings) -> list:
    job, (_, entry) = findings.job, findings.cells[0]
    spread = "Behind ±: the standard error of the mean over them." if len(job.study.seeds) > 1 else \
        "In brackets: the 95% interval for so many images of the same weights." * findings.has_intervals
    reference = f"{entry['reference_count']:,} " if entry.get("reference_count") else ""
    against = {"digits_fd": ", against the 1,797 real digits", "digits_unsure": ""}.get(
        findings.headline, f", against {reference}training images")
    seeds = ", ".join(map(str, job.study.seeds))
    return [Text(
        f"{len(findings.cells)} of {len(job.all_cells)} cells are measured. All runs share data, data order and the "
        f"seeds of weights and noise ({seeds}), and differ in the keys of the first table. {findings.name} is of "
        f"{job.study.num_images} images, {SEEDS[job.study.image_seeds]}{against}: comparable "
        f"within this report only. {spread} Bold is the lowest of a row, which says nothing where the "
        f"spreads overlap. Made with study.py from {job.study.config}.")]


def runs_table(findings: Findings) -> list:
    job, rows = findings.job, []
    others = any(keys.keys() - IN_COLUMNS for keys in job.study.runs.values())
    for run in findings.runs:
        config = job.configs[f"{run}-{job.study.seeds[0]}"]
        loss = config.loss
        minutes = [_training_minutes(job, f"{run}-{seed}") for seed in job.study.seeds]
        changed = ", ".join(f"{key} {value}" for key, value in job.study.runs[run].items() if key not in IN_COLUMNS)
        rows.append([run, str(loss.num_consecutive_steps), f"{loss.lamda:g}", f"{loss.input_perturbation:g}",
                     *([changed] if others else []), f"{job.step(findings.budget):,}", str(loss.calls),
                     f"{sum(minutes) / len(minutes):.1f}"])
    return [Heading("Runs"), Table(["run", "K", "lamda", "gamma", *(["other keys"] if others else []), "steps",
                                    "calls for each image", "minutes"], rows)]


def _training_minutes(job: StudyJob, doc: str) -> float:
    """From the speeds that metrics.jsonl has, so that pauses do not count."""
    seconds, before = 0.0, 0
    for line in read_metrics(job.run(doc).metrics):
        if line.get("images_per_s"):
            batch = job.configs[doc].training.global_batch_size
            seconds, before = seconds + (line["step"] - before) * batch / line["images_per_s"], line["step"]
    return seconds / 60


def steps_part(findings: Findings) -> list:
    """Every sampler after the whole training, and its curves over the number of steps."""
    keys = [key for key in findings.values if key[2] == findings.budget]
    labels = [label for label in dict.fromkeys(key[0] for key in keys)
              if len([key for key in keys if key[0] == label]) > 1]
    curves = [(label, "sampling steps", [(key, key[1]) for key in keys if key[0] == label]) for label in labels]
    blocks = [Heading(f"{findings.name} after {findings.budget:,} training images"),
              _values_table(findings, keys, ["sampler", "steps"], lambda key: [key[0], str(key[1])])]
    if curves:
        path = findings.job.folder / "figures" / "fid_over_steps.png"
        draw(findings, curves, path)
        blocks.append(Picture(path, f"{findings.name} against the number of sampling steps; {BARS}"))
    return blocks


def images_part(findings: Findings) -> list:
    """The course of training."""
    courses = {}
    for key in findings.values:
        courses.setdefault(key[:2], []).append(key)
    courses = {course: sorted(keys, key=lambda key: key[2]) for course, keys in courses.items() if len(keys) > 1}
    if not courses:
        return []
    path = findings.job.folder / "figures" / "fid_over_training.png"
    draw(findings, [(f"{label}, {steps} steps", "training images", [(key, key[2]) for key in keys])
                    for (label, steps), keys in courses.items()], path)
    table = _values_table(findings, [key for keys in courses.values() for key in keys],
                       ["sampler", "steps", "training images"], lambda key: [key[0], str(key[1]), f"{key[2]:,}"])
    return [Heading(f"{findings.name} in the course of training"), table,
            Picture(path, f"{findings.name} against the number of training images seen; {BARS}")]


def _values_table(findings: Findings, keys: list[tuple], header: list[str], name) -> Table:
    rows, bold = [], set()
    for number, key in enumerate(keys):
        values = [findings.value(key, run) for run in findings.runs]
        best = min((value.mean for value in values if value), default=None) if len(values) > 1 else None
        bold |= {(number, len(header) + i) for i, value in enumerate(values) if value and value.mean == best}
        rows.append([*name(key), *(value.text if value else "" for value in values)])
    return Table([*header, *findings.runs], rows, bold)


def precision_part(findings: Findings) -> list:
    keys = [key for key in findings.values if key[2] == findings.budget]
    if "pr" not in findings.job.study.metrics:
        return []
    rows = []
    for key in keys:
        means = [[_mean(findings.values[key].get(run, []), name) for name in ("precision", "recall")]
                 for run in findings.runs]
        rows.append([key[0], str(key[1]), *(f"{p:.3f} / {r:.3f}" if p is not None else "" for p, r in means)])
    return [Heading(f"Precision / recall after {findings.budget:,} training images"),
            Table(["sampler", "steps", *findings.runs], rows)]


def _mean(found: list, name: str) -> float | None:
    return sum(entry[name] for _, entry in found) / len(found) if found else None


def grids_part(findings: Findings) -> list:
    blocks = [Heading("Samples")]
    for (label, steps, images), by_run in findings.values.items():
        pictures = []
        for run in findings.runs:
            for cell, _ in by_run.get(run, [])[:1]:
                path = findings.job.folder / "grids" / f"{cell.file_name}.png"
                if path.exists():
                    pictures.append((run, path))
        if pictures and images == findings.budget:
            blocks.append(Gallery(f"{label}, {steps} steps: the same seeds for all runs", pictures))
    return blocks if len(blocks) > 1 else []


def cells_part(findings: Findings) -> list:
    measures = [key for key in TITLES if key != findings.headline and any(key in e for _, e in findings.cells)]
    header = ["run", "seed", "images seen", "sampler", "steps", "calls", findings.name,
              *(TITLES[key] for key in measures), "95% interval of FID", "sampling s", "cell s"]
    rows = []
    for cell, entry in findings.cells:
        fit = entry.get("fit") or {}
        fitted = f", B = {fit['b']:.4f}" + " (no correction)" * bool(fit.get("no_correction")) if fit else ""
        low, high = entry.get("fid_interval_95") or [0, 0]
        rows.append([cell.run, str(cell.seed), f"{cell.images_seen:,}", cell.label + fitted,
                     str(cell.settings["timesteps"]), str(entry["network_calls"]),
                     f"{entry[findings.headline]:.{findings.digits + 1}f}",
                     *(f"{entry[key]:.4g}" if key in entry else "" for key in measures),
                     f"{low:.2f} to {high:.2f}" if low < high else "",
                     f"{entry['sampling_seconds']:.0f}", f"{entry['seconds']:.0f}"])
    return [Heading("All cells"), Table(header, rows)]


def draw(findings: Findings, panels: list, path: Path) -> None:
    """One panel for each (title, x label, [(key, x), ...]), three in a row, one line for each run."""
    from matplotlib.figure import Figure

    columns = min(len(panels), 3)
    rows = ceil(len(panels) / columns)
    figure = Figure(figsize=(6 * columns, 4.2 * rows), layout="constrained")
    for place, (title, xlabel, points) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        for number, run in enumerate(findings.runs):
            found = [(x, *findings.value(key, run)[:3]) for key, x in sorted(points, key=lambda point: point[1])
                     if findings.value(key, run)]
            if found:
                x, y, low, high = zip(*found, strict=True)
                shift = 1.012 ** (number - (len(findings.runs) - 1) / 2)    # bars side by side
                errors = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
                axes.errorbar([value * shift for value in x], y, errors, color=PALETTE[number % len(PALETTE)],
                              linestyle="-" if number < len(PALETTE) else "--", label=run, marker="o", markersize=4,
                              linewidth=1.6, elinewidth=1)
        ticks = sorted({x for _, x in points})
        axes.set(xlabel=xlabel, ylabel=findings.name, xscale="log")
        axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(title, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.legend(fontsize="small", frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def describe_plan(job: StudyJob) -> str:
    """The grid, with its network calls; what --dry_run prints."""
    done, lines, total = job.read_cells(), ["dry run: nothing was written"], 0
    for run, seed in job.runs:
        doc = f"{run}-{seed}"
        calls = job.study.images_seen[-1] * job.configs[doc].loss.calls
        state = "trained" if job.trained(doc) else "to train"
        lines.append(f"  {doc:16} {job.step(job.study.images_seen[-1]):,} steps, {calls:,} images through the network; "
                     f"{state}")
    for number, cell in enumerate(job.cells, 1):
        calls = job.calls[cell.key] * job.study.num_images
        state = "measured" if cell.key in done else "to measure"
        total += calls * (cell.key not in done)
        fit = " and the fit" if cell.fits else ""
        lines.append(f"  {number:3} {cell}: {calls:,} images through the network{fit}; {state}")
    left = sum(cell.key not in done for cell in job.cells)
    inception = "" if all(metric.startswith("digits") for metric in job.study.metrics) else \
        f", {left * job.study.num_images:,} through Inception"
    lines.append(f"{left} of {len(job.cells)} cells to measure: {total:,} images through the network{inception}")
    return "\n".join(lines)
