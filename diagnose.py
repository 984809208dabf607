"""Measure exposure bias (eps-norms, variance error, estimation gap along the chain), fit an epsilon scaling, and
measure likelihoods."""

import argparse
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from runners.cli import Parser, add_common, positive, run_script, safe_name
from runners.sampling.flags import add_sampler_flags
from utils.errors import UserError


def parse(argv):
    parser = Parser(prog="diagnose.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    made = {}
    for name, measure in COMMANDS.items():
        made[name] = commands.add_parser(name, help=measure.__doc__.splitlines()[0], description=measure.__doc__)
        _add_run(made[name])
    made["exposure"].add_argument("--start_t", metavar="LIST", help="beside pure noise, start from q(x_t | x0) at "
                                  "these times, such as 250,500; the nearest steps are taken (default: the middle)")
    fit = made["fit-eps-scaler"]
    fit.add_argument("--model", choices=["auto", "constant", "linear"], default="auto",
                     help="fit B, K,B, or K,B only where K is more than two standard errors from 0")
    fit.add_argument("--fid_check", type=positive, metavar="N", help="also compute the FID of N images at 0, 0.5, "
                                                                     "1, 1.5 and 2 times the fitted scaling")
    fit.add_argument("--fid_stats", metavar="FILE", help="reference statistics (default: sampling.fid_stats)")
    fit.add_argument("--inception_weights", metavar="FILE", help="weights of the feature network")
    nll = made["nll"]
    nll.set_defaults(timesteps=None, sample_type="ddpm_noisy", var_type=None)
    nll.add_argument("--npz", action="store_true", help="also write guided-diffusion's vb_terms.npz, mse_terms.npz and "
                                                        "xstart_mse_terms.npz")
    return parser.parse(argv)


def _add_run(parser) -> None:
    """Which runs, images and chains."""
    parser.add_argument("--config", metavar="NAME.yml", help="default: the run's own; any key of it can be overridden: "
                                                             "--data.root DIR")
    parser.add_argument("--doc", nargs="+", help="runs, exp/logs/DOC, on one figure (default: the config's name)")
    parser.add_argument("--weights", metavar="FILE", help="load this file or folder instead of a run's checkpoint; "
                                                          "needs --config")
    parser.add_argument("--ckpt_id", type=int, help="epoch (default: sampling.ckpt_id, else the newest)")
    parser.add_argument("--model_ema", action=argparse.BooleanOptionalAction, default=True, help="averaged weights")
    parser.add_argument("--num_images", type=positive, default=256, metavar="N", help="real images and chains")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images and of all noise; chain n starts "
                                                            "from the latent of generate.py's image SEED + n")
    parser.add_argument("--batch_size", type=positive, help="images at a time (default: sampling.batch_size)")
    add_sampler_flags(parser, timesteps="100")
    add_common(parser, config=False)


class Job:
    """The checked request."""

    def __init__(self, args):
        from datasets import find_dataset
        from functions.schedule import make_schedule
        from models import make_codec
        from runners.sampling.flags import sampler_settings
        from runners.sampling.sampler import check_settings

        self.args = args
        if args.seed < 0:
            raise UserError(f"--seed {args.seed} must be at least 0")
        if not (args.doc or args.config):
            raise UserError("--doc is required: the names of runs under exp/logs/")
        names = args.doc or [Path(args.config).stem]
        if len(set(names)) < len(names):
            raise UserError("--doc names a run twice")
        self.datasets = Path(args.exp) / "datasets"
        self.runs = {name: self._open(name) for name in names}                  # name -> config, weights
        if args.command == "nll":
            self._prepare_likelihood()
        self.settings = sampler_settings(args)
        for config, _ in self.runs.values():
            self.steps = check_settings(self.settings, make_schedule(config.diffusion), make_codec(config),
                                        config.model)
            find_dataset(config, self.datasets)
        if args.command == "fit-eps-scaler":
            self._check_fit()
        self.starts = self._starts() if args.command == "exposure" else []
        folder = "+".join(name.replace("/", "-") for name in names)
        self.target = Path(args.exp) / "diagnose" / folder / f"{args.command}-{self.file_label}"

    def _open(self, name: str):
        """The run's own configuration wins over --config, which must not contradict it."""
        from configs.schema import load_config
        from runners.training.checkpoint import RunFolder, refuse_differences

        run = RunFolder(Path(self.args.exp) / "logs" / safe_name("--doc", name))
        if self.args.weights:
            return self._open_file(Path(self.args.weights))
        if not (self.args.config or run.config.exists()):
            raise UserError(f"no configuration: {run.config} does not exist, and --config is not given")
        config = load_config(self.args.config or run.config, self.args.overrides)
        if run.config.exists():
            refuse_differences(load_config(run.config), config, run.config)
        ckpt_id = config.sampling.ckpt_id if self.args.ckpt_id is None else self.args.ckpt_id
        return config, run.weights(ckpt_id, self.args.model_ema)

    def _open_file(self, file: Path):
        from configs.schema import load_config

        if not self.args.config or (self.args.doc and len(self.args.doc) > 1):
            raise UserError("--weights needs --config, and at most one --doc for the name of the results")
        if not file.exists():
            raise UserError(f"--weights {file}: no such file")
        return load_config(self.args.config, self.args.overrides), file

    def _starts(self) -> list[float | None]:
        """None for pure noise, then the times nearest to --start_t."""
        middle = self.steps[len(self.steps) // 2]
        try:
            wanted = [float(t) for t in self.args.start_t.split(",")] if self.args.start_t else [middle]
        except ValueError:
            raise UserError(f"--start_t {self.args.start_t!r} is not a list such as 250,500") from None
        if not all(0 <= t <= self.steps[-1] for t in wanted):
            raise UserError(f"--start_t {self.args.start_t}: the chain has times 0 to {self.steps[-1]}")
        taken = [min(self.steps, key=lambda s, t=t: abs(s - t)) for t in wanted]
        if self.args.start_t and taken != wanted:
            print(f"--start_t {self.args.start_t}: the nearest times of the chain are taken, "
                  f"{', '.join(map(str, taken))}")
        return list(dict.fromkeys([None, *taken]))

    def _prepare_likelihood(self) -> None:
        """All steps and learned variances, unless somebody says otherwise; what would not be read is refused."""
        from runners.diagnosis.likelihood import check_likelihood

        args, configs = self.args, [config for config, _ in self.runs.values()]
        for config in configs:
            check_likelihood(config)
        lengths = sorted({config.diffusion.chain_length for config in configs})
        if args.timesteps is None and len(lengths) > 1:
            raise UserError(f"these runs have chains of {' and '.join(map(str, lengths))} steps; give --timesteps")
        if args.sample_type != "ddpm_noisy" or args.eps_scaler or args.classes or args.guidance is not None:
            raise UserError("nll is of the ancestral chain and the images' own labels: no other --sample_type, no "
                            "--eps_scaler, no --classes, no --guidance")
        args.timesteps = args.timesteps or str(lengths[0])
        learned = all(config.model.gives_variances for config in configs)
        args.var_type = args.var_type or ("learned" if learned else "fixedlarge")

    def _check_fit(self) -> None:
        if self.args.eps_scaler is not None:
            raise UserError("fit-eps-scaler searches --eps_scaler; do not give one")
        if self.args.fid_check:
            for name in self.runs:
                self.reference(name)

    def reference(self, name: str):
        from runners.evaluation.metrics import find_reference

        return find_reference(self.runs[name][0], self.args.fid_stats, config_name=self.args.config)

    @property
    def file_label(self) -> str:
        """The sampler and the weights in few words, for file names: a run may be measured at several epochs."""
        files = sorted({weights.stem for _, weights in self.runs.values()})
        return re.sub(r"[^A-Za-z0-9.+_-]+", "-", f"{self.settings} {'+'.join(files)}").strip("-")

    def command(self, name: str, scaler: str) -> str:
        """generate.py with the sampler measured here and ``scaler``."""
        args = self.args
        flags = {"--exp": args.exp if args.exp != "exp" else None, "--config": args.config, "--doc": name,
                 "--ckpt_id": args.ckpt_id, "--timesteps": args.timesteps, "--eps_scaler": scaler}
        kept = self.settings.model_dump(exclude_defaults=True, exclude={"timesteps", "eps_scaler", "clip_denoised"})
        flags |= {f"--{key}": ",".join(map(str, value)) if isinstance(value, tuple) else value
                  for key, value in kept.items()}
        words = [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]
        clip = {None: [], True: ["--clip_denoised"], False: ["--no-clip_denoised"]}[self.settings.clip_denoised]
        ema = [] if args.model_ema else ["--no-model_ema"]
        return shlex.join(["python", "generate.py", *words, *clip, *ema])


def eps_norm(job, name, diagnosis):
    """Norm of the predicted noise, in training and along the chain, and their ratio.

    A ratio above 1 that grows towards the image is the drift that exposure bias accumulates.
    """
    return diagnosis.eps_norms(), {}


def exposure(job, name, diagnosis):
    """Variance of the chain minus that of the noised images, step by step."""
    return diagnosis.exposure(job.starts), {}


def gap(job, name, diagnosis):
    """Gap between predicted and true noise along a chain from noised images, and the gap that has accumulated."""
    return diagnosis.gaps(), {}


def fit_eps_scaler(job, name, diagnosis):
    """Find the epsilon scaling K,B that gives the chain the eps-norms of training.

    The chain is run again and again with the same seeds; a fit holds for the number of steps it was made with.
    """
    from runners.diagnosis.measures import fid_of_scalings
    from runners.distributed import on_rank_zero

    args = job.args
    fit, rows = diagnosis.fit(args.model)
    scaler = f"{fit.k:.4g},{fit.b:.5g}" if fit.k else f"{fit.b:.5g}"
    on_rank_zero(lambda: print(f"{name}  eps_scaler {scaler}  (standard errors {fit.k_error:.1g}, {fit.b_error:.1g})\n"
                               f"eps-norms (median of the steps) off by {fit.before:.2%} without, "
                               f"{fit.mismatch:.2%} with it\n"
                               f"{job.command(name, scaler)}"))
    details = {"fit": fit._asdict()}
    if args.fid_check:
        details["fid"] = fid_of_scalings(diagnosis, fit, args.fid_check, job.reference(name), args.inception_weights)
        on_rank_zero(lambda: [print("{name:10} {fid:9.4f}  eps_scaler {k:.4g},{b:.5g}".format(**each))
                              for each in details["fid"]])
    return rows, details


def nll(job, name, diagnosis):
    """Negative log likelihood of real images in bits per dimension, with its terms at each step.

    By default over all steps, with learned variances where the network has them, and clipped estimates. What is
    finished of a long measurement is kept: the same command goes on.
    """
    from runners.diagnosis.likelihood import likelihood, write_published
    from runners.distributed import on_rank_zero

    rows, summary = likelihood(diagnosis, job.target.with_name(f"{job.target.name}-{Path(name).name}"))
    on_rank_zero(lambda: print(f"{name}  {summary['bits_per_dim']:.4f} bits/dim  (standard error "
                               f"{summary['standard_error']:.2g}, {summary['num_images']} images, {len(rows)} steps; "
                               f"of these {summary['prior_bits']:.2g} in the prior)"))
    if job.args.npz:
        on_rank_zero(lambda: write_published(rows, job.target.with_name(f"{job.target.name}-{Path(name).name}")))
    return rows, summary


COMMANDS = {"eps-norm": eps_norm, "exposure": exposure, "gap": gap, "fit-eps-scaler": fit_eps_scaler, "nll": nll}


def check(args):
    Job(args)


def work(args, device):
    from datasets.packed import open_images
    from runners.diagnosis.measures import Diagnosis
    from runners.diffusion import Diffusion
    from runners.distributed import on_rank_zero

    job, rows, details = Job(args), {}, {}
    for name, (config, weights) in job.runs.items():
        diffusion = Diffusion(config, device)
        diffusion.load(weights, args.model_ema)
        diagnosis = Diagnosis(diffusion, open_images(config, job.datasets, "train", device), job.settings,
                              num_images=args.num_images, seed=args.seed,
                              batch_size=args.batch_size or config.sampling.batch_size)
        rows[name], more = COMMANDS[args.command](job, name, diagnosis)
        details[name] = {"weights": str(weights), **asdict(diffusion.weights), **more}
    on_rank_zero(lambda: write(job, rows, details))


def write(job, rows, details):
    """TARGET.csv, TARGET.png and TARGET.json, which notes how they were made."""
    from runners.diagnosis.curves import PANELS, write_figure, write_table
    from utils.atomic import write_json

    args, target = job.args, job.target
    target.parent.mkdir(parents=True, exist_ok=True)
    write_table(rows, target.with_name(f"{target.name}.csv"))
    write_figure(f"{job.settings}; {args.num_images} images", PANELS[args.command](rows),
                 target.with_name(f"{target.name}.png"))
    write_json(target.with_name(f"{target.name}.json"), {
        "measure": args.command, "sampler": job.settings.model_dump(mode="json"), "num_images": args.num_images,
        "seed": args.seed, "starts": job.starts, "runs": details})
    print(f"{target}.csv\n{target}.png")


def main(argv=None) -> int:
    return run_script(__file__, argv, parse, check, work)


if __name__ == "__main__":
    sys.exit(main())
