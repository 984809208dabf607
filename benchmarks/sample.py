"""Sampling by DDIM into PNG files, against the reference procedure and diffusers; memory; more and more images.

    python -m benchmarks.sample --parts speed memory           # CPU: 5 steps of 8 images, some 4 minutes
    python -m benchmarks.sample --parts compile                # CPU: what compiling costs and saves, 4 minutes
    python -m benchmarks.sample --parts growth                 # CPU: 15 minutes
    python -m benchmarks.sample --device cuda --batch 256 --steps 50

A chain costs the same at each step, so on a CPU five steps tell what fifty would; only the PNG files get ten times
their share. DDPM's CIFAR-10 network, random weights.

The growth with the number of images needs other settings (GROWTH): small networks and few steps, or 50,000 images
would take hours.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.harness import alternate_apart, arguments, in_fresh_process, peak_memory, report, synchronize, table
from benchmarks.reference import build_reference, make_betas, sample_and_save
from benchmarks.workload import as_scripts_do, make_config
from configs.sampling import SamplerSettings
from functions.schedule import make_schedule
from functions.timesteps import sampling_times
from runners.compilation import layers_of
from runners.diffusion import Diffusion
from runners.sampling.folder import ImageFolder
from runners.sampling.generation import generate
from runners.sampling.writers import PngWriter

AMP = {"fp32": None, "bf16": torch.bfloat16}
GROWTH = {"cpu": ("digits.yml", "fp32", 2, 50), "cuda": ("cifar10.yml", "bf16", 5, 250)}    # steps and batch at the end


def our_sampling(config, device, precision: str, settings: SamplerSettings, batch: int, folder: Path):
    """generate.py's loop: every call makes ``images``, one batch if not said, into a new folder."""
    as_scripts_do(device)
    diffusion, numbers = Diffusion(config, device), itertools.count()
    diffusion.amp, diffusion.compiled = AMP[precision.partition(" ")[0]], "compiled" in precision
    sampler = diffusion.sampler(settings)

    def sample(images: int = batch) -> int:
        target = ImageFolder(folder / f"{precision} {next(numbers)}")
        target.path.mkdir()
        writer = PngWriter(target, config.data.shape)
        return sum(len(chunk) for _, chunk, _ in generate(sampler, range(images), batch, writer))

    return sample


def reference_sampling(config, device, steps: int, batch: int, folder: Path):
    network, betas = build_reference(config, device).eval(), make_betas(config, device)
    timesteps, numbers = sampling_times(make_schedule(config.diffusion), steps), itertools.count()

    def sample() -> int:
        x = torch.randn(batch, *config.data.shape, device=device)
        return sample_and_save(network, betas, x, timesteps, folder / f"reference {next(numbers)}")

    return sample


def against_reference(args, config, folder: Path) -> None:
    makers = {"reference": partial(reference_sampling, config, args.device, args.steps, args.batch, folder)}
    makers |= peers.available({"diffusers DDIMPipeline, no files": (
        "diffusers", partial(peers.diffusers_sampling, args.batch, args.steps, args.device))})
    for precision in ("fp32", "bf16") + ("bf16 compiled",) * args.compile:
        makers[f"here, {precision}"] = partial(
            our_sampling, config, args.device, precision, SamplerSettings(timesteps=args.steps), args.batch, folder)
    report(f"DDIM, {args.steps} steps, batch {args.batch}, {args.device}", alternate_apart(makers, args.rounds),
           baseline="reference", precision="as named", steps=args.steps, batch=args.batch)
    print()


def compiling(args, config, folder: Path) -> None:
    """What compiling takes off a chain and what it costs: the constants of ``runners/compilation.py``."""
    kinds = [precision + suffix for precision in AMP for suffix in ("", " compiled")]
    settings = SamplerSettings(timesteps=args.steps)
    makers = {kind: partial(our_sampling, config, args.device, kind, settings, args.batch, folder) for kind in kinds}
    rates = alternate_apart(makers, 1 + args.rounds, warm_up=0)
    layers, rows = layers_of(build_reference(config, "cpu")), []
    for precision in AMP:
        eager, compiled = (statistics.median(rates[precision + suffix][1:]) for suffix in ("", " compiled"))
        spent = args.batch / rates[f"{precision} compiled"][0] - args.batch / compiled
        rows.append([precision, eager, compiled, f"{1 - eager / compiled:+.1%}", spent, spent / layers])
    table(f"DDIM, {args.steps} steps, batch {args.batch}, {args.device}",
          ["images/s", "compiled", "saved", "seconds to compile", "for each layer"], rows, rates=rates, layers=layers)
    print()


def chain_memory(folder: Path, device: str, batch: int, steps: int, images: int, here: bool) -> float:
    """GiB at the peak of sampling beyond the process as it was. A small network, so that states would show."""
    config = make_config(folder, batch, name="cifar10_tiny.yml", **{"data.image_size": 64})
    settings = SamplerSettings(timesteps=steps)
    sample = (partial(our_sampling(config, device, "fp32", settings, batch, folder), images) if here else
              reference_sampling(config, device, steps, batch, folder))
    return peak_memory(sample)[1]                                                    # states are kept on the host


def memory(args, folder: Path) -> None:
    rows = []
    cases = [("reference", steps, 32, False) for steps in args.memory_steps]
    cases += [("here", steps, 32, True) for steps in args.memory_steps]
    cases += [("here", args.memory_steps[0], 128, True)]
    for name, steps, images, here in cases:
        own = Path(tempfile.mkdtemp(dir=folder))
        rows.append([name, steps, images, in_fresh_process(chain_memory, own, args.device, 32, steps, images, here)])
    table("host memory, 1.1 M parameters, 64x64, batch 32", ["steps", "images", "peak, GiB"], rows)
    print()


def timed_images(folder: Path, device: str, images: int) -> tuple[float, float]:
    """Seconds for ``images`` images after a warm-up of one batch, and GiB at the peak beyond the process as it was."""
    name, precision, steps, batch = GROWTH[device]
    config = make_config(folder, 1, name=name)

    def work() -> float:
        sample = our_sampling(config, device, precision, SamplerSettings(timesteps=steps), batch, folder)
        sample()
        synchronize()
        start = time.perf_counter()
        sample(images)
        synchronize()
        return time.perf_counter() - start

    return peak_memory(work)


def growth(args, folder: Path) -> None:
    """Time and memory as the number of images grows: all numbers in turn, each time in a process of its own."""
    found = {images: [] for images in args.images}
    for _ in range(args.rounds):
        for images, values in found.items():
            with tempfile.TemporaryDirectory(dir=folder) as own:
                values.append(in_fresh_process(timed_images, Path(own), args.device, images))
    rows = []
    for images, values in found.items():
        seconds, peaks = zip(*values, strict=True)
        rows.append([images, statistics.median(seconds), statistics.median(seconds) / images * 1000,
                     f"{min(seconds) / images * 1000:.4g} - {max(seconds) / images * 1000:.4g}",
                     statistics.median(peaks)])
    name, precision, steps, batch = GROWTH[args.device]
    table(f"images ({name}, {precision}, {steps} steps, batch {batch}, {args.device})",
          ["seconds", "ms for each", "range", "peak host memory, GiB"], rows, rounds=found)
    print()


def main():
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10000, 50000],
                        help="how many in the growth table; a CPU takes some 3 minutes for each round of these")
    parser.add_argument("--memory_steps", type=int, nargs="+", default=[5, 80])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--parts", nargs="+", default=["speed", "memory", "growth"],
                        choices=["speed", "memory", "compile", "growth"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")         # every run compiles anew
        if "compile" in args.parts:
            compiling(args, make_config(folder, args.batch), folder)
        if "speed" in args.parts:
            against_reference(args, make_config(folder, args.batch), folder)
        if "memory" in args.parts:
            memory(args, folder)
        if "growth" in args.parts:
            growth(args, folder)


if __name__ == "__main__":
    main()
