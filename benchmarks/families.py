"""ADM's and EDM's CIFAR-10 recipes: training step and sampling chain against a plain reading of their own procedures.

    python -m benchmarks.families                                     # CPU, batch 8, some eight minutes
    python -m benchmarks.families --only edm --parts sample --batch 4
    python -m benchmarks.families --device cuda --batch 128 --rounds 20
    python -m benchmarks.families --small --rounds 1                  # tiny networks: does it run?

adm is DDPM-IP's recipe (57.1 M parameters; hybrid loss, gamma 0.15, loss-second-moment times) and DDIM on ddimN steps;
edm is DDPM++ (55.7 M; lognormal levels, augmentation) and Heun's method. What stands under "reference" is
``benchmarks/reference_adm.py`` and ``benchmarks/reference_edm.py``; each candidate runs in a process of its own.
"""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import alternate_apart, arguments, report
from benchmarks.reference_adm import ReferenceADMTraining, reference_adm_sampling
from benchmarks.reference_edm import ReferenceEDMTraining, reference_edm_sampling
from benchmarks.sample import our_sampling
from benchmarks.workload import make_config, our_training, write_pictures
from configs.sampling import SamplerSettings
from configs.schema import Config


class Family(NamedTuple):
    name: str                          # of the configuration
    training: Callable                 # (config, pictures, device) -> what takes a step
    sampling: Callable                 # (config, device, settings, batch, folder) -> what makes a batch
    settings: Callable                 # number of steps -> SamplerSettings
    steps: int                         # on a CPU: a chain costs the same at each step
    small: dict                        # overrides that leave milliseconds of the network


FAMILIES = {
    "adm": Family("adm/cifar10_ip.yml", ReferenceADMTraining, reference_adm_sampling,
                  lambda steps: SamplerSettings(timesteps=f"ddim{steps}", clip_denoised=True), 5,
                  {"model.num_channels": 32, "model.channel_mult": [1, 2], "model.num_res_blocks": 1,
                   "model.attention_resolutions": [8], "data.image_size": 16}),
    "edm": Family("edm/cifar10_ddpmpp.yml", ReferenceEDMTraining, reference_edm_sampling,
                  lambda steps: SamplerSettings(sample_type="heun", timesteps=steps), 18,
                  {"model.model_channels": 32, "model.channel_mult": [1, 2], "model.num_blocks": 1,
                   "model.attn_resolutions": [8], "data.image_size": 16}),
}


def family_config(family: Family, pictures: Path, batch: int, precision: str = "fp32", small: bool = False) -> Config:
    """The recipe on ``pictures``; the batch is all that differs, and the plain loss stays plain."""
    return make_config(pictures, batch, precision, steps=1, name=family.name, **{
        "training.global_batch_size": "null", "training.total_images": "null", **(family.small if small else {})})


def precisions(args) -> list[str]:
    return ["fp32", "bf16"] + ["bf16 compiled"] * args.compile


def train(name: str, args, folder: Path) -> dict[str, list[float]]:
    """Images/s of a training step, optimizer and average included."""
    family = FAMILIES[name]
    pictures = write_pictures(folder / "pictures", 8 * args.batch, 16 if args.small else 32)
    make = partial(family_config, family, pictures, args.batch, small=args.small)
    makers = {"reference": partial(family.training, make(), pictures, args.device)}
    makers |= {f"here, {precision}": partial(our_training, make(precision), folder / name / precision, args.device)
               for precision in precisions(args)}
    return alternate_apart(makers, args.rounds)


def sample(name: str, args, folder: Path) -> dict[str, list[float]]:
    """Images/s of a chain into files."""
    family, config = FAMILIES[name], family_config(FAMILIES[name], Path("."), args.batch, small=args.small)
    settings = family.settings(args.steps or family.steps)
    makers = {"reference": partial(family.sampling, config, args.device, settings, args.batch, folder)}
    makers |= {f"here, {precision}": partial(our_sampling, config, args.device, precision, settings, args.batch, folder)
               for precision in precisions(args)}
    return alternate_apart(makers, args.rounds)


PARTS = {"train": train, "sample": sample}


def title(name: str, part: str, args) -> str:
    steps = args.steps or FAMILIES[name].steps
    chain = f"DDIM, ddim{steps}" if name == "adm" else f"Heun, {steps} steps"
    what = "training step" if part == "train" else chain
    return f"{FAMILIES[name].name.removesuffix('.yml')}, {what}, batch {args.batch}, {args.device}"


def main():
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, help="of the chain; default: 5 of DDIM, 18 of Heun's method")
    parser.add_argument("--compile", action="store_true", help="a row of bf16 compiled; minutes of compiling on a CPU")
    parser.add_argument("--only", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--small", action="store_true", help="tiny networks: does it run?")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(temporary) / "inductor")    # every run compiles anew
        for name in args.only:
            for part in args.parts:
                with tempfile.TemporaryDirectory(dir=temporary) as folder:
                    rates = PARTS[part](name, args, Path(folder))
                report(title(name, part, args) + ", tiny" * args.small, rates, baseline="reference",
                       precision="as named", batch=args.batch)
                print()


if __name__ == "__main__":
    main()
