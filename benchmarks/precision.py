"""Loss curves of fp32 and bf16 from the same weights, data and noise, beside fp32 with another seed: docs/bf16.png.

    python -m benchmarks.precision --source ../shared/data/cifar10-32x32.zip            # some minutes on two idle cores
    python -m benchmarks.precision --source ... --other_seed_steps 100                  # the third run ends earlier
    python -m benchmarks.precision --source ... --batch 64 --steps 400                  # an hour
"""

import argparse
import json
import tempfile
from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.harness import table
from benchmarks.workload import Training, make_config

matplotlib.use("Agg")
PLOT = Path(__file__).parent.parent / "docs/bf16.png"
OTHER = "fp32, another seed"
RUNS = {"fp32": ("fp32", 1024), "bf16": ("bf16", 1024), OTHER: ("fp32", 1025)}
STYLES = {"fp32": (4, "-", 2), "bf16": (1.6, "--", 3), OTHER: (1.6, "-", 1)}   # width, dashes, order
COLORS = dict(zip(RUNS, ("#8fb8d0", "#c1440e", "#b0b7bd"), strict=True))


def losses(args, precision: str, seed: int, num_steps: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean loss of each logging interval."""
    config = make_config(args.source, args.batch, precision, name="cifar10_tiny.yml", **{
        "data.dataset": "ZIP", "training.log_freq": args.interval, "training.seed": seed})
    step = Training(config, folder, args.device)
    for _ in range(num_steps):
        step()
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return np.array([line["step"] for line in lines]), np.array([line["loss"] for line in lines])


def draw(curves: dict, path: Path, args) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, (steps, values) in curves.items():
        width, dashes, above = STYLES[name]
        left.plot(steps, values, color=COLORS[name], label=name, lw=width, ls=dashes, zorder=above)
        if name != "fp32":
            right.plot(steps, 100 * difference(curves, name), color=COLORS[name], label=name, lw=1.8)
    left.set(yscale="log", xlabel="step", title="Training loss", yticks=[300, 500, 1000, 2000])
    left.yaxis.set_major_formatter("{x:,.0f}")
    left.minorticks_off()
    left.legend(frameon=False)
    right.set(yscale="log", xlabel="step", title="Difference from fp32")
    right.yaxis.set_major_formatter("{x:g}%")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"cifar10_tiny, K = 2, batch {args.batch}; means of {args.interval} steps", fontsize=10)
    figure.savefig(path, dpi=100)


def difference(curves: dict, name: str) -> np.ndarray:
    """Of each point from fp32's, relative, as far as the curve goes."""
    values = curves[name][1]
    return np.abs(values / curves["fp32"][1][:len(values)] - 1)


def summary(curves: dict) -> list[list]:
    """A row of each curve; one that ended early has no last quarter."""
    base = curves["fp32"][1]
    last, rows = slice(3 * len(base) // 4, None), []
    for name, (_, values) in curves.items():
        whole, off = len(values) == len(base), difference(curves, name)
        rows.append([name, len(values), float(values[0]), float(values[last].mean()) if whole else "-",
                     f"{values[last].mean() / base[last].mean() - 1:+.2%}" if whole else "-",
                     f"{off.mean():.2%}", f"{off.max():.2%}"])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="zip of 32x32 images")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--other_seed_steps", type=int, metavar="N",
                        help="of the third run; default: as many; 0: without")
    parser.add_argument("--interval", type=int, default=10, help="steps of a point of the curves")
    parser.add_argument("--plot", type=Path, default=PLOT)
    args = parser.parse_args()
    num_steps = dict.fromkeys(RUNS, args.steps)
    if args.other_seed_steps is not None:
        num_steps[OTHER] = min(args.steps, args.other_seed_steps)
    for name, steps in num_steps.items():
        if 0 < steps < args.interval or (name != OTHER and not steps):
            parser.error(f"{name}: {steps} steps are less than one point of --interval {args.interval}")
    with tempfile.TemporaryDirectory() as temporary:
        curves = {name: losses(args, *RUNS[name], steps, Path(temporary) / name)
                  for name, steps in num_steps.items() if steps}
    draw(curves, args.plot, args)
    table(f"{args.steps} steps of {args.batch} images, {args.device}", [
        "points", "first point", "last quarter", "against fp32", "mean difference of a point", "largest"],
        summary(curves), steps=num_steps, losses={name: values.tolist() for name, (_, values) in curves.items()})


if __name__ == "__main__":
    main()
