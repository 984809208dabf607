"""Tables and figures of the measures of exposure bias: one CSV and one PNG for any number of runs."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from utils.atomic import atomic_path, write_text

Rows = list[dict]
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")    # Okabe and Ito
STYLES = ("-", "--", ":", "-.")


class Curve(NamedTuple):
    label: str | None                # None: not in the legend
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None       # standard errors, drawn as a band of two
    colour: int = 0
    style: int = 0


class Panel(NamedTuple):
    ylabel: str
    curves: list[Curve]
    reference: float | None = None   # a thin line there
    scale: str = "linear"
    title: str = ""


def column(rows: Rows, key: str, **where) -> list:
    return [row[key] for row in rows if all(row[name] == value for name, value in where.items())]


def eps_norm_panels(runs: dict[str, Rows]) -> list[Panel]:
    norms, ratios = [], []
    for colour, (name, rows) in enumerate(runs.items()):
        t = column(rows, "t")
        norms += [Curve(f"{name}, {kind}", t, column(rows, kind), column(rows, f"{kind}_error"), colour, style)
                  for style, kind in enumerate(("sampling", "training"))]
        ratios.append(Curve(name, t, column(rows, "ratio"), column(rows, "ratio_error"), colour))
    return [Panel(r"mean $\|\epsilon_\theta(x_t, t)\|_2$", norms), Panel("sampling / training", ratios, 1.0)]


def exposure_panels(runs: dict[str, Rows]) -> list[Panel]:
    deltas, roots = [], []
    for colour, (name, rows) in enumerate(runs.items()):
        for style, start in enumerate(dict.fromkeys(column(rows, "start"))):
            s = column(rows, "s", start=start)
            label = f"{name}, from " + ("noise" if start == "noise" else rf"$q(x_{{{start}}}|x_0)$")
            deltas.append(Curve(label, s, column(rows, "delta", start=start),
                                column(rows, "standard_error", start=start), colour, style))
            roots.append(Curve(label, s, column(rows, "root_delta", start=start), None, colour, style))
    return [Panel(r"$\delta_s$ = Var$_{chain}(x_s)$ - Var$_q(x_s)$", deltas, 0.0),
            Panel(r"sign($\delta_s$) $\sqrt{|\delta_s|}$", roots, 0.0)]


def gap_panels(runs: dict[str, Rows]) -> list[Panel]:
    single, total = [], []
    for colour, (name, rows) in enumerate(runs.items()):
        t = column(rows, "t")
        single += [Curve(name, t, column(rows, "gap"), None, colour),
                   Curve(f"{name}, noise floor", t, column(rows, "noise_floor"), None, colour, 2)]
        total.append(Curve(name, column(rows, "next_t"), column(rows, "accumulated_gap"), None, colour))
    return [Panel(r"$\|$mean $d_t\|_2$", single, scale="log"),
            Panel(r"accumulated $\|$mean $G_t\|_2$", total, scale="log")]


def fit_panels(runs: dict[str, Rows]) -> list[Panel]:
    before, after = ({name: [row for row in rows if row["scaled"] == scaled] for name, rows in runs.items()}
                     for scaled in (0, 1))
    panels = [eps_norm_panels(before)[1], eps_norm_panels(after)[1]]
    return [panel._replace(title=title) for panel, title in zip(panels, ("without scaling", "with it"), strict=True)]


def likelihood_panels(runs: dict[str, Rows]) -> list[Panel]:
    bits, errors = [], []
    for colour, (name, rows) in enumerate(runs.items()):
        t = column(rows, "t")
        bits.append(Curve(name, t, column(rows, "bits"), column(rows, "bits_error"), colour))
        errors += [Curve(f"{name}, of {label}", t, column(rows, key), column(rows, f"{key}_error"), colour, style)
                   for style, (key, label) in enumerate({"x0_mse": "$x_0'$", "eps_mse": r"$\epsilon'$"}.items())]
    return [Panel("$L_t$, bits for each dimension", bits, scale="log"),
            Panel("mean squared error", errors, scale="log")]


PANELS: dict[str, Callable[[dict[str, Rows]], list[Panel]]] = {
    "eps-norm": eps_norm_panels, "exposure": exposure_panels, "gap": gap_panels, "fit-eps-scaler": fit_panels,
    "nll": likelihood_panels}


def write_table(runs: dict[str, Rows], path: Path) -> None:
    """One CSV, the run's name in the first column."""
    text = io.StringIO()
    rows = [{"run": name, **row} for name, found in runs.items() for row in found]
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def write_figure(title: str, panels: list[Panel], path: Path) -> None:
    """The panels side by side; time falls from left to right, as the chain runs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="medium")
    together = all(panel.title for panel in panels)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=together)[0], panels, strict=True):
        _draw(axes, panel)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _draw(axes, panel: Panel) -> None:
    for curve in panel.curves:
        colour = PALETTE[curve.colour % len(PALETTE)]
        axes.plot(curve.x, curve.y, color=colour, linestyle=STYLES[curve.style % len(STYLES)], label=curve.label,
                  linewidth=1.6, marker="o" if len(curve.x) <= 25 else None, markersize=3)
        if curve.error:
            low, high = zip(*((y - 2 * error, y + 2 * error) for y, error in zip(curve.y, curve.error, strict=True)),
                            strict=True)
            axes.fill_between(curve.x, low, high, color=colour, alpha=0.15, linewidth=0)
    if panel.reference is not None:
        axes.axhline(panel.reference, color="0.4", linewidth=0.8, zorder=0)
    axes.set(xlabel="time $t$ (the chain runs to the right)", ylabel=panel.ylabel, yscale=panel.scale)
    axes.set_title(panel.title, fontsize="medium")
    axes.invert_xaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(fontsize="small", frameon=False)
