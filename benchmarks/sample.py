"""Sampling by DDIM into PNG files, against the reference procedure and diffusers; memory; more and more images.

    python -m benchmarks.sample                                               # CPU: 5 steps of 8 images
    python -m benchmarks.sample --device cuda --batch 512 --steps 50 --images 50 1000 10000 50000

A chain costs the same at each step, so on a CPU five steps tell what fifty would; only the PNG files get ten times
their share. DDPM's CIFAR-10 network, random weights.
"""

import argparse
import itertools
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.harness import alternate, report, table
from benchmarks.reference import build_reference, make_betas, sample_and_save
from benchmarks.workload import make_config, quiet
from functions.timesteps import sampling_timesteps
from runners.diffusion import Diffusion
from runners.generation import ImageFolder, PngWriter, generate

AMP = {"fp32": None, "bf16": torch.bfloat16}


def our_sampling(config, device, precision: str, steps: int, batch: int, folder: Path, images: int | None = None):
    """generate.py's loop: every call makes ``images`` into a new folder."""
    diffusion, numbers = Diffusion(config, device), itertools.count()
    diffusion.amp, diffusion.compiled = AMP[precision.partition(" ")[0]], "compiled" in precision
    seeds = list(range(images or batch))

    def sample() -> int:
        target = ImageFolder(folder / f"{precision} {next(numbers)}")
        target.path.mkdir()
        writer = PngWriter(target, config.data.shape)
        return sum(len(chunk) for _, chunk, _ in generate(diffusion, seeds, {"timesteps": steps}, batch, writer))

    return sample


def reference_sampling(config, device, steps: int, batch: int, folder: Path):
    network, betas = build_reference(config, device).eval(), make_betas(config, device)
    timesteps, numbers = sampling_timesteps(len(betas), steps), itertools.count()

    def sample() -> int:
        x = torch.randn(batch, *config.data.shape, device=device)
        return sample_and_save(network, betas, x, timesteps, folder / f"reference {next(numbers)}")

    return sample


def against_reference(args, config, folder: Path) -> None:
    calls = {"reference": reference_sampling(config, args.device, args.steps, args.batch, folder)}
    calls |= peers.available({"diffusers DDIMPipeline, no files": (
        "diffusers", partial(peers.diffusers_sampling, args.batch, args.steps, args.device))})
    for precision in ("fp32", "bf16") + ("bf16 compiled",) * args.compile:
        calls[f"here, {precision}"] = our_sampling(config, args.device, precision, args.steps, args.batch, folder)
    report(f"DDIM, {args.steps} steps, batch {args.batch}, {args.device}", alternate(calls, args.rounds),
           baseline="reference", precision="as named", steps=args.steps, batch=args.batch)
    print()


def chain_memory(folder: Path, device: str, batch: int, steps: int, images: int, here: bool) -> float:
    """GiB at the peak of sampling beyond the process as it was. A small network, so that states would show."""
    quiet()
    config = make_config(folder, batch, name="cifar10_tiny.yml", **{"data.image_size": 64})
    sample = (our_sampling(config, device, "fp32", steps, batch, folder, images) if here else
              reference_sampling(config, device, steps, batch, folder))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sample()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024                 # states are kept on the host
    return (peak - before) / 2**30


def memory(args, folder: Path) -> None:
    rows = []
    cases = [("reference", steps, 32, False) for steps in args.memory_steps]
    cases += [("here", steps, 32, True) for steps in args.memory_steps]
    cases += [("here", args.memory_steps[0], images, True) for images in (128, 512)]
    for name, steps, images, here in cases:
        own = Path(tempfile.mkdtemp(dir=folder))
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            peak = fresh.submit(chain_memory, own, args.device, 32, steps, images, here).result()
        rows.append([name, steps, images, peak])
    table("host memory, 1.1 M parameters, 64x64, batch 32", ["steps", "images", "peak, GiB"], rows)
    print()


def growth(args, folder: Path) -> None:
    """Time for each image as their number grows, with a small network on a CPU."""
    small = args.device == "cpu"
    config = make_config(folder, 1, name="cifar10_tiny.yml" if small else "cifar10.yml")
    rows = []
    for images in args.images:
        batch = min(args.batch if not small else 50, images)
        sample = our_sampling(config, args.device, "fp32", 2 if small else args.steps, batch, folder, images)
        start = time.perf_counter()
        sample()
        seconds = time.perf_counter() - start
        rows.append([images, seconds, seconds / images * 1000,
                     resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20])
    table("images", ["seconds", "ms for each", "peak of the process, GiB"], rows)
    print()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, nargs="+", default=[50, 200, 1000, 4000])
    parser.add_argument("--memory_steps", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--parts", nargs="+", default=["speed", "memory", "growth"],
                        choices=["speed", "memory", "growth"])
    args = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "speed" in args.parts:
            against_reference(args, make_config(folder, args.batch), folder)
        if "memory" in args.parts:
            memory(args, folder)
        if "growth" in args.parts:
            growth(args, folder)


if __name__ == "__main__":
    main()
