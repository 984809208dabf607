"""The main figures of each measure in one line."""

import statistics
from collections.abc import Callable

Rows = list[dict]


def largest(rows: Rows, key: str, error: str, neutral: float = 0.0, errors: float = 2.0) -> dict:
    """The row that deviates most, of those that do so by more than so many standard errors if there are any."""
    sure = [row for row in rows if abs(row[key] - neutral) > errors * row[error]] or rows
    return max(sure, key=lambda row: abs(row[key] - neutral))


def first_calls(rows: Rows) -> Rows:
    """Those of ``eps-norm`` that are of the first evaluation of a step."""
    return [row for row in rows if row["evaluation"] == "first"]


def _time(t) -> str:
    return t if isinstance(t, str) else f"{t:.4g}"


def _ratios(rows: Rows, what: str) -> str:
    worst = largest(rows, "ratio", "ratio_error", 1.0)
    median = statistics.median(row["ratio"] for row in rows)
    return (f"{what}, sampling / training: median {median:.4f}; furthest from 1 at t = {_time(worst['t'])}: "
            f"{worst['ratio']:.4f} (standard error {worst['ratio_error']:.2g})")


def of_exposure(rows: Rows) -> str:
    parts = []
    for start in dict.fromkeys(row["start"] for row in rows):
        chain = [row for row in rows if row["start"] == start]
        worst, last = largest(chain, "delta", "standard_error"), chain[-1]
        parts.append(f"from {'noise' if start == 'noise' else f't = {_time(start)}'}: delta of the sample "
                     f"{last['delta']:+.4g} (standard error {last['standard_error']:.2g}) of variance "
                     f"{last['var_q']:.4g}; largest {worst['delta']:+.4g} at s = {_time(worst['s'])}")
    return "; ".join(parts)


def of_gap(rows: Rows) -> str:
    worst = max(rows, key=lambda row: row["gap"] / max(row["noise_floor"], 1e-12))
    return (f"accumulated gap at the image {rows[-1]['accumulated_gap']:.4g}; clearest single gap "
            f"{worst['gap']:.4g} at t = {_time(worst['t'])}, where chance alone gives {worst['noise_floor']:.4g}")


def of_spectrum(rows: Rows) -> str:
    lowest = min(row["t"] for row in rows if row["quantity"] == "x0")
    bands = ", ".join(f"{row['band']} {row['ratio']:.3f}" for row in rows
                      if row["quantity"] == "x0" and row["t"] == lowest)
    rings = [row["ratio"] for row in rows if row["quantity"] == "image"]
    return (f"energy of x0' at t = {_time(lowest)}, sampling / training: {bands}; power of final images over the "
            f"data's: {rings[0]:.3f} at the lowest frequency, {rings[-1]:.3f} at the highest")


def telling(rows: Rows) -> Rows:
    """Those of ``snr`` whose effective time is known to a twentieth of the chain; all, where there are none."""
    span = max(row["t"] for row in rows) - min(row["t"] for row in rows)
    return [row for row in rows if row["effective_error"] < span / 20] or rows


def of_snr(rows: Rows) -> str:
    rows = telling(rows)
    worst = largest(rows, "shift", "effective_error")
    median = statistics.median(row["shift"] for row in rows)
    return (f"effective minus nominal time: median {median:+.3g}; largest {worst['shift']:+.3g} at t = "
            f"{_time(worst['t'])} (standard error {worst['effective_error']:.2g})")


def of_energy(rows: Rows) -> str:
    return f"{_ratios(rows, 'energy of x0')}; of the data {rows[0]['data']:.4f}, of the last estimate " \
           f"{rows[0]['sampling']:.4f}"


SUMMARIES: dict[str, Callable[[Rows], str]] = {
    "eps-norm": lambda rows: _ratios(first_calls(rows), "eps-norm"), "exposure": of_exposure, "gap": of_gap,
    "spectrum": of_spectrum, "snr": of_snr, "gamma": lambda rows: _ratios(rows, "Gamma"), "energy": of_energy}
