"""Loss curves of fp32 and bf16 from the same weights, data and noise, beside fp32 with another seed: docs/bf16.png.

    python -m benchmarks.precision --source ../shared/data/cifar10-32x32.zip            # an hour on two cores
    python -m benchmarks.precision --source ... --batch 16 --steps 200                  # some minutes
"""

import argparse
import json
import tempfile
from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.harness import table
from benchmarks.workload import Training, make_config, quiet

matplotlib.use("Agg")
PLOT = Path(__file__).parent.parent / "docs/bf16.png"
RUNS = {"fp32": ("fp32", 1024), "bf16": ("bf16", 1024), "fp32, another seed": ("fp32", 1025)}
STYLES = {"fp32": (4, "-", 2), "bf16": (1.6, "--", 3), "fp32, another seed": (1.6, "-", 1)}   # width, dashes, order
COLORS = dict(zip(RUNS, ("#8fb8d0", "#c1440e", "#b0b7bd"), strict=True))


def losses(args, precision: str, seed: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean loss of each logging interval."""
    config = make_config(args.source, args.batch, precision, name="cifar10_tiny.yml", **{
        "data.dataset": "ZIP", "training.log_freq": args.interval, "training.seed": seed})
    step = Training(config, folder, args.device)
    for _ in range(args.steps):
        step()
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return np.array([line["step"] for line in lines]), np.array([line["loss"] for line in lines])


def draw(curves: dict, path: Path, args) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    steps, base = curves["fp32"]
    for name, (width, dashes, above) in STYLES.items():
        left.plot(*curves[name], color=COLORS[name], label=name, lw=width, ls=dashes, zorder=above)
        if name != "fp32":
            right.plot(steps, 100 * np.abs(curves[name][1] / base - 1), color=COLORS[name], label=name, lw=1.8)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="zip of 32x32 images")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--interval", type=int, default=10, help="steps of a point of the curves")
    parser.add_argument("--plot", type=Path, default=PLOT)
    args = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        curves = {name: losses(args, *run, Path(temporary) / name) for name, run in RUNS.items()}
    draw(curves, args.plot, args)
    base = curves["fp32"][1]
    last = slice(3 * len(base) // 4, None)
    rows = [[name, float(values[0]), float(values[last].mean()), f"{values[last].mean() / base[last].mean() - 1:+.2%}",
             f"{np.abs(values / base - 1).mean():.2%}", f"{np.abs(values / base - 1).max():.2%}"]
            for name, (_, values) in curves.items()]
    table(f"{args.steps} steps of {args.batch} images", [
        "first interval", "last quarter", "against fp32", "mean difference of a point", "largest"], rows,
        losses={name: values.tolist() for name, (_, values) in curves.items()})


if __name__ == "__main__":
    main()
