"""The measurements of ``benchmarks.gpu``, one for each call: python -m benchmarks.gpu_parts PART --figures FILE

Each appends its figures to FILE as they are found, one JSON object a line, so that a part that breaks or is stopped
leaves what it had. Ratios are to the reference procedure of ``benchmarks/reference.py`` in the same run, on the same
device, in turn, each in a process of its own.
"""

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.harness import alternate_apart, in_fresh_process, machine, markdown, matrix_rate

# (batch, rounds) of training, (batch, steps, rounds) of sampling, images and rounds of FID.
SIZES = {False: {"train": (128, 10), "64x64": (32, 10), "sample": (256, 50, 3), "family sample": (128, 3),
                 "fid": (2000, 3), "wait": 50},
         True: {"train": (4, 1), "64x64": (2, 1), "sample": (4, 3, 1), "family sample": (4, 1), "fid": (8, 1),
                "wait": 5}}
SMALL = {"model.ch": 32, "model.ch_mult": [1, 2], "model.num_res_blocks": 1, "model.attn_resolutions": [8],
         "data.image_size": 16}
FAMILY_STEPS = {"adm": 25, "edm": 18}                # of their chains
SPEED, UTILISATION, WAIT = 4.0, 0.35, 0.01           # targets


class Figures:
    """Appends what is measured to a file."""

    def __init__(self, args):
        self.args, self.about = args, {**machine(), "device": args.device, "small": args.small}

    def add(self, what: str, value: float, unit: str, *, reference: float | None = None, target: float | None = None,
            at_most: bool = False, **more) -> None:
        """One figure.

        Args:
            reference: The reference procedure's; the target is then of the ratio.
            target: The least, or with ``at_most`` the most, that is wanted.
        """
        ratio = None if reference is None else value / reference
        judged = value if ratio is None else ratio
        met = None if target is None else judged <= target if at_most else judged >= target
        line = {"part": self.args.part, "what": what, "value": value, "unit": unit, "reference": reference,
                "ratio": ratio, "target": target, "at_most": at_most, "met": met, **more, **self.about}
        with open(self.args.figures, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(what, f"{value:,.4g} {unit}", "" if ratio is None else f"{ratio:.2f} times the reference", flush=True)


def medians(makers: dict, rounds: int, warm_up: int) -> dict[str, float]:
    """The middle rate of each."""
    return {key: statistics.median(values) for key, values in alternate_apart(makers, rounds, warm_up=warm_up).items()}


def rates_of_the_machine(args, figures: Figures) -> None:
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
        if args.device == "cuda" or name != "fp16":
            figures.add(f"matrix product in {name}", matrix_rate(dtype, args.device, rounds=3) / 1e12, "TFLOP/s")


def train(args, figures: Figures, steps: int, name: str = "cifar10.yml", size: str = "train", compiled: bool = False,
          targets: tuple = (None, None)) -> None:
    """Images/s of a training step with K = ``steps``, optimizer and average included; its share of the matrix rate."""
    from benchmarks.reference import ReferenceTraining
    from benchmarks.workload import make_config, our_training, step_flops, write_pictures

    (batch, rounds), overrides = SIZES[args.small][size], SMALL if args.small else {}
    with tempfile.TemporaryDirectory() as folder:
        pictures = write_pictures(Path(folder) / "pictures", 4 * batch, 64 if size == "64x64" else 32)
        make = partial(make_config, pictures, batch, steps=steps, name=name, **overrides)
        flops, peak = step_flops(make())[1] * steps, matrix_rate(torch.bfloat16, args.device, rounds=3)
        makers, reference = {"reference": partial(ReferenceTraining, make(), pictures, args.device)}, None
        for kind in ["bf16"] + ["bf16 compiled"] * (compiled and not args.small):    # told before minutes of compiling
            makers[kind] = partial(our_training, make(precision=kind), Path(folder) / kind, args.device)
            rates = medians(makers, rounds, warm_up=0 if args.small else 3)
            reference, makers = rates.get("reference", reference), {}
            what = f"{name.removesuffix('.yml')}, K = {steps}, batch {batch}, {kind}"
            figures.add(f"training step, {what}", rates[kind], "images/s", reference=reference, target=targets[0])
            figures.add(f"share of the bf16 matrix rate, {what}", rates[kind] * flops / peak, "", target=targets[1])


def family(args, figures: Figures, name: str, part: str) -> None:
    """Images/s of ADM's or EDM's recipe against a plain reading of its own procedure: ``benchmarks.families``."""
    from benchmarks import families

    batch, rounds = SIZES[args.small]["train" if part == "train" else "family sample"]
    given = SimpleNamespace(batch=batch, rounds=rounds, steps=3 if args.small else FAMILY_STEPS[name], compile=False,
                            small=args.small, device=args.device)
    with tempfile.TemporaryDirectory() as folder:
        rates = families.PARTS[part](name, given, Path(folder))
    medians = {key: statistics.median(values) for key, values in rates.items()}
    for precision in families.precisions(given):
        figures.add(f"{families.title(name, part, given)}, {precision}", medians[f"here, {precision}"], "images/s",
                    reference=medians["reference"], target=SPEED if precision == "bf16" else None)


def waits(args, figures: Figures) -> None:
    """What the host waits for between logging points, how long it waits for data, and the longest kernels."""
    from benchmarks.trace import profile_steps
    from benchmarks.workload import make_config, our_training, write_pictures

    batch, num = SIZES[args.small]["train"][0], SIZES[args.small]["wait"]
    overrides = {"training.log_freq": 10**6, **(SMALL if args.small else {})}
    with tempfile.TemporaryDirectory() as folder:
        pictures = write_pictures(Path(folder) / "pictures", 4 * batch, 32)
        step = our_training(make_config(pictures, batch, "bf16", **overrides), Path(folder), args.device)
        for _ in range(3):
            step()
        found = profile_steps(step, 3, torch.device(args.device))
        figures.add("calls that wait for the device in 3 steps without a logging point", sum(found.waits.values()), "",
                    target=0, at_most=True, names=found.waits)
        figures.add("device busy, of 3 steps under the profiler", found.busy / found.seconds, "", top=found.top)
        figures.add("data wait, of a step", data_wait(step, num, args.device), "", target=WAIT, at_most=True)
    rows = [[name[:90], f"{seconds / found.busy:.1%}"] for name, seconds in found.top]
    print("\n" + markdown(["longest kernels, K = 2, bf16", "of the device's time"], rows))


def data_wait(step, num: int, device: str) -> float:
    """Share of the time of ``num`` steps that ``next(batches)`` takes."""
    batches, spent = step.session.batches, 0.0

    def timed():
        nonlocal spent
        while True:
            began = time.perf_counter()
            batch = next(batches)
            spent += time.perf_counter() - began
            yield batch

    step.session.batches = timed()
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(num):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return spent / (time.perf_counter() - began)


def sample(args, figures: Figures) -> None:
    """Images/s of DDIM into PNG files, and what the files cost; memory."""
    from benchmarks.sample import our_sampling, reference_sampling
    from benchmarks.workload import make_config
    from configs.sampling import SamplerSettings

    batch, steps, rounds = SIZES[args.small]["sample"]
    config, settings = make_config(Path("."), batch, **(SMALL if args.small else {})), SamplerSettings(timesteps=steps)
    with tempfile.TemporaryDirectory() as folder:
        ours = {kind: partial(our_sampling, config, args.device, kind, settings, batch, Path(folder))
                for kind in ("fp32", "bf16", "bf16 compiled")}
        compiled = {"bf16 compiled": ours.pop("bf16 compiled")}
        makers = {"reference": partial(reference_sampling, config, args.device, steps, batch, Path(folder)), **ours,
                  "no files": partial(sampling_without_files, config, args.device, steps, batch)}
        rates = {}
        for group in [makers] + [compiled] * (not args.small):                  # told before minutes of compiling
            rates |= medians(group, rounds, warm_up=0 if args.small else 1)
            for kind in [each for each in group if each not in ("reference", "no files")]:
                figures.add(f"DDIM, {steps} steps, batch {batch}, {kind}", rates[kind], "images/s",
                            reference=rates["reference"], target=SPEED if kind != "fp32" else None)
            if "no files" in group:
                figures.add("what PNG files cost, of a chain in bf16", 1 - rates["bf16"] / rates["no files"], "",
                            target=0.05, at_most=True)


def sampling_without_files(config, device: str, steps: int, batch: int):
    """The chain of ``our_sampling`` in bf16, whose images come to the host and go nowhere."""
    from benchmarks.workload import as_scripts_do
    from configs.sampling import SamplerSettings
    from runners.diffusion import Diffusion
    from runners.sampling.generation import generate
    from runners.sampling.writers import NoWriter

    as_scripts_do(device)
    diffusion = Diffusion(config, device)
    diffusion.amp = torch.bfloat16
    sampler = diffusion.sampler(SamplerSettings(timesteps=steps))
    return lambda: sum(len(chunk) for _, chunk, _ in generate(sampler, range(batch), batch, NoWriter()))


def fid(args, figures: Figures) -> None:
    """Images/s from PNG files to Inception features, against pytorch-fid."""
    from benchmarks.fid import pass_here, pass_of_pytorch_fid
    from benchmarks.workload import write_pictures

    num, rounds = SIZES[args.small]["fid"]
    with tempfile.TemporaryDirectory() as folder:
        pictures = write_pictures(Path(folder), num, 32)
        makers = {"pytorch-fid": partial(pass_of_pytorch_fid, [str(p) for p in sorted(pictures.glob("*.png"))],
                                         args.device),
                  "here": partial(pass_here, pictures, args.device)}
        rates = medians(makers, rounds, warm_up=0 if args.small else 1)
    figures.add(f"Inception features of {num} PNG files", rates["here"], "images/s", reference=rates["pytorch-fid"],
                target=2.0)


def memory(args, figures: Figures) -> None:
    """--dry_run's prediction of a step's memory against the allocator's peak (on a CPU: the process's)."""
    from benchmarks.train import step_memory
    from benchmarks.workload import make_config, write_pictures

    batch = SIZES[args.small]["train"][0]
    for precision in ("fp32", "bf16"):
        with tempfile.TemporaryDirectory() as folder:
            pictures = write_pictures(Path(folder) / "pictures", 4 * batch, 32)
            config = make_config(pictures, batch, precision, **(SMALL if args.small else {}))
            measured, predicted = in_fresh_process(step_memory, config, Path(folder), args.device)
        figures.add(f"memory of a step, K = 2, batch {batch}, {precision}, predicted", predicted, "GiB",
                    reference=measured)
        figures.add(f"the same, off by, {precision}", abs(predicted / measured - 1), "", target=0.15, at_most=True)


PARTS = {
    "machine": rates_of_the_machine, "waits": waits, "memory": memory, "sample": sample, "fid": fid,
    "train-adm": partial(family, name="adm", part="train"), "sample-adm": partial(family, name="adm", part="sample"),
    "train-edm": partial(family, name="edm", part="train"), "sample-edm": partial(family, name="edm", part="sample"),
    "train-k1": partial(train, steps=1), "train-k2": partial(train, steps=2, compiled=True,
                                                                                     targets=(SPEED, UTILISATION)),
    "train-k4": partial(train, steps=4), "train-64": partial(train, steps=2, name="celeba.yml", size="64x64"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--figures", required=True, type=Path)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--small", action="store_true", help="tiny networks, one round: does it run?")
    args = parser.parse_args()
    PARTS[args.part](args, Figures(args))


if __name__ == "__main__":
    main()
