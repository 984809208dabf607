"""What the figure of each measure shows: panels made of the rows of any number of runs."""

from collections.abc import Callable

from functions.spectrum import BANDS
from runners.diagnosis.curves import Curve, Panel, Rows
from runners.diagnosis.summary import telling


def column(rows: Rows, key: str, **where) -> list:
    return [row[key] for row in rows if all(row[name] == value for name, value in where.items())]


def eps_norm_panels(runs: dict[str, Rows]) -> list[Panel]:
    norms, ratios = [], []
    for colour, (name, rows) in enumerate(runs.items()):
        def curve(label, key, style, evaluation="first", rows=rows, colour=colour):
            found = [row for row in rows if row["evaluation"] == evaluation]
            return Curve(label, column(found, "t"), column(found, key), column(found, f"{key}_error"), colour, style)

        norms += [curve(f"{name}, sampling", "sampling", 0), curve(f"{name}, training", "training", 1)]
        ratios.append(curve(name, "ratio", 0))
        if "corrector" in column(rows, "evaluation"):
            norms.append(curve(f"{name}, corrector", "sampling", 2, "corrector"))
            ratios.append(curve(f"{name}, corrector", "ratio", 2, "corrector"))
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


def gamma_panels(runs: dict[str, Rows]) -> list[Panel]:
    sizes, ratios = _pairs(runs)
    return [Panel(r"$\Gamma_t$ = E$\|\epsilon_\theta\|^2$ / pixel", sizes), Panel("sampling / training", ratios, 1.0)]


def energy_panels(runs: dict[str, Rows]) -> list[Panel]:
    sizes, ratios = _pairs(runs)
    for colour, (name, rows) in enumerate(runs.items()):
        sizes.append(Curve(f"{name}, data", column(rows, "t"), column(rows, "data"), None, colour, 2))
    return [Panel(r"E$\|x_0'\|^2$ / pixel", sizes), Panel("sampling / training", ratios, 1.0)]


def _pairs(runs: dict[str, Rows], **where) -> tuple[list[Curve], list[Curve]]:
    """Sampling and training, and their ratio, over time."""
    sizes, ratios = [], []
    for colour, (name, rows) in enumerate(runs.items()):
        t = column(rows, "t", **where)
        sizes += [Curve(f"{name}, {kind}", t, column(rows, kind, **where), column(rows, f"{kind}_error", **where),
                        colour, style) for style, kind in enumerate(("sampling", "training"))]
        ratios.append(Curve(name, t, column(rows, "ratio", **where), column(rows, "ratio_error", **where), colour))
    return sizes, ratios


def spectrum_panels(runs: dict[str, Rows]) -> list[Panel]:
    """Ratios in the bands, a style for each; of several runs a colour for each. Rings of the final images last."""
    panels, several = [], len(runs) > 1
    for quantity, label in (("x", "$x_t$"), ("x0", "$x_0'$")):
        curves = []
        for number, (name, rows) in enumerate(runs.items()):
            for style, band in enumerate(BANDS):
                where = {"quantity": quantity, "band": band}
                curves.append(Curve(f"{name}, {band}" if several else band, column(rows, "t", **where),
                                    column(rows, "ratio", **where), column(rows, "ratio_error", **where),
                                    number if several else style, style))
        panels.append(Panel(f"energy of {label}, sampling / training", curves, 1.0))
    curves = []
    for colour, (name, rows) in enumerate(runs.items()):
        rings = [row for row in rows if row["quantity"] == "image"]
        curves.append(Curve(name, range(len(rings)), column(rings, "ratio"), column(rings, "ratio_error"), colour))
    return [*panels, Panel("power of final images / of data", curves, 1.0,
                           xlabel="frequency (periods over the shorter side)")]


def snr_panels(runs: dict[str, Rows]) -> list[Panel]:
    shifts, slopes = [], []
    for colour, (name, rows) in enumerate(runs.items()):
        sure = telling(rows)
        shifts.append(Curve(name, column(sure, "t"), column(sure, "shift"), column(sure, "effective_error"), colour))
        slopes.append(Curve(name, column(rows, "t"), column(rows, "slope"), None, colour))
    return [Panel("effective time - time", shifts, 0.0), Panel(r"$\partial M(s, t) / \partial t$ at $s$", slopes, 0.0)]


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
    "eps-norm": eps_norm_panels, "exposure": exposure_panels, "gap": gap_panels, "spectrum": spectrum_panels,
    "snr": snr_panels, "gamma": gamma_panels, "energy": energy_panels, "fit-eps-scaler": fit_panels,
    "nll": likelihood_panels}
