"""The training step, optimizer and EMA included, against the reference procedure and against libraries.

    python -m benchmarks.train                                      # CPU, batch 8, some ten minutes
    python -m benchmarks.train --device cuda --batch 128 --rounds 50

DDPM's CIFAR-10 network. Each figure is the median over rounds in which all candidates take a step in turn, each in a
process of its own.
"""

import argparse
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.harness import alternate_apart, arguments, in_fresh_process, matrix_rate, peak_memory, report, table
from benchmarks.reference import ReferenceTraining
from benchmarks.workload import Training, make_config, our_training, step_flops, write_pictures
from configs.schema import Config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def against_reference(args, folder: Path, pictures: Path, steps: int) -> dict[str, float]:
    """Images/s of a step with K = ``steps``; returns the medians."""
    makers = {"reference": partial(
        ReferenceTraining, make_config(pictures, args.batch, steps=steps), pictures, args.device)}
    if steps == 1:
        makers |= peers.available({
            "diffusers": ("diffusers", partial(peers.diffusers_training, pictures, args.batch, args.device)),
            "denoising-diffusion-pytorch (28.5 M)": ("denoising_diffusion_pytorch", partial(
                peers.denoising_diffusion_training, pictures, args.batch, args.device))})
    for precision in ("fp32", "bf16") + ("bf16 compiled",) * (args.compile and steps == 2):
        makers[f"here, {precision}"] = partial(
            our_training, make_config(pictures, args.batch, precision, steps), folder / precision, args.device)
    rates = alternate_apart(makers, 1 + args.rounds, warm_up=0)
    first = {name: args.batch / values[0] for name, values in rates.items()}
    rates = {name: values[1:] for name, values in rates.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    report(f"K = {steps}, batch {args.batch}, {args.device}", rates, baseline="reference", precision="as named",
           batch=args.batch, first_call_seconds=first)
    compiling = {name: first[name] - args.batch / medians[name] for name in makers if "compiled" in name}
    print("".join(f"\nCompiling ({name}) took {spent:.0f} s more than a step.\n" for name, spent in compiling.items()))
    return medians


def utilisation(args, medians: dict[str, float], steps: int) -> None:
    """How much of the machine's matrix rate a step reaches."""
    forward, whole = step_flops(make_config(Path("."), args.batch))
    rates = {name: matrix_rate(dtype, args.device) for name, dtype in DTYPES.items()}
    rows = []
    for name, images in medians.items():
        if name == "reference" or name.startswith("here"):
            peak = rates["bf16" if "bf16" in name else "fp32"]
            achieved = images * whole * steps
            rows.append([name, achieved / 1e9, peak / 1e9, f"{achieved / peak:.0%}"])
    table(f"K = {steps}: model FLOPs ({forward / 1e9:.1f} G forward, {whole / 1e9:.1f} G with backward, per image and "
          "network evaluation)", ["GFLOP/s", "matrix product GFLOP/s", "share"], rows)
    print()


def cost_of_k(args, folder: Path, pictures: Path, precision: str) -> None:
    makers = {f"K = {k}": partial(our_training, make_config(pictures, args.batch, precision, k), folder / f"K{k}",
                                  args.device) for k in (1, 2, 3, 4)}
    seconds = {name: [args.batch / rate for rate in rates]
               for name, rates in alternate_apart(makers, args.rounds).items()}
    report(f"step in {precision}, batch {args.batch}", seconds, baseline="K = 1", unit="seconds", precision=precision,
           batch=args.batch)
    print()


def step_memory(config: Config, folder: Path, device: str) -> list[float]:
    """GiB that two training steps take beyond the process as it was: measured, and as --dry_run predicts it."""
    from runners.training.dry_run import training_memory

    torch.optim.Adam([torch.zeros(1)])         # the first one imports 80 MiB of torch, no part of a step

    def two_steps() -> Training:
        step = our_training(config, folder, device)
        step()
        step()
        return step

    step, measured = peak_memory(two_steps)
    if device == "cuda":
        measured = torch.cuda.max_memory_allocated() / 2**30
    x = torch.zeros(2, *config.data.shape, dtype=torch.uint8)
    return [measured, training_memory(step.diffusion, x, step.plan)[0] / 2**30]


def memory(args, folder: Path, pictures: Path) -> None:
    cases, rows = [("cifar10", args.batch, 1), ("cifar10", args.batch, 2), ("cifar10_tiny", 8 * args.batch, 2)], []
    for name, batch, steps in cases:
        for checkpointing in (False, True):
            config = make_config(pictures, batch, steps=steps, name=f"{name}.yml", **{
                "training.activation_checkpointing": checkpointing})
            with tempfile.TemporaryDirectory(dir=folder) as own:
                measured, predicted = in_fresh_process(step_memory, config, Path(own), args.device)
            rows.append([f"{name}, batch {batch}, K = {steps}" + ", checkpointing" * checkpointing,
                         measured, predicted, f"{predicted / measured - 1:+.0%}"])
    table(f"memory of a step, fp32, {args.device}", ["peak, GiB", "--dry_run, GiB", "off by"], rows)
    print()


def main():
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=512, help="how many PNG files to train on")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--parts", nargs="+", default=["speed", "cost", "memory"], choices=["speed", "cost", "memory"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")         # every run compiles anew
        pictures = write_pictures(folder / "pictures", max(args.pictures, 8 * args.batch), 32)
        if "speed" in args.parts:
            for steps in (2, 1):
                utilisation(args, against_reference(args, folder, pictures, steps), steps)
        if "cost" in args.parts:
            cost_of_k(args, folder, pictures, "bf16")
        if "memory" in args.parts:
            memory(args, folder, pictures)


if __name__ == "__main__":
    main()
