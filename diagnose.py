"""Measure exposure bias along the chain in seven ways, fit an epsilon scaling, measure Gamma for analytic variances and
likelihoods."""

import argparse
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from runners.cli import Parser, add_common, positive, run_script
from runners.sampling.flags import add_sampler_flags
from utils.errors import UserError
from utils.names import safe_name

HELP = {
    "eps-norm": "norm of the predicted noise, in training and along the chain",
    "exposure": "variance of the chain minus that of the noised images, step by step",
    "gap": "gap between predicted and true noise along the chain, single and accumulated",
    "spectrum": "energy in frequency bands along the chain, spectrum of its images against the data's",
    "snr": "effective time: at which noise level training gives the network what the chain gives it",
    "gamma": "size of the predicted noise for each pixel, forward and along the chain; writes the file for --gamma",
    "energy": "energy of the estimated images, forward and along the chain, against the data's",
    "fit-eps-scaler": "find the epsilon scaling K,B that gives the chain the eps-norms of training; it holds for the "
                      "number of steps it was made with",
    "nll": "negative log likelihood of real images in bits per dimension, with its terms at each step; by default over "
           "all steps, with learned variances where there are some, and clipped estimates; a stopped one goes on",
    "all": "every measure of the chain's drift on one page, with a verdict in words",
}


def parse(argv):
    parser = Parser(prog="diagnose.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser, metavar=" | ".join(HELP))
    made = {}
    for name, text in HELP.items():
        made[name] = commands.add_parser(name, help=text, description=text)
        _add_run(made[name])
    for name in ("exposure", "all"):
        made[name].add_argument("--start_t", metavar="LIST", help="for exposure: beside pure noise, start from q(x_t | "
                                "x0) at these times, such as 250,500; the nearest are taken (default: the middle)")
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
    parser.add_argument("--weights", metavar="FILE", help="load this file instead of a run's checkpoint; EDM's "
                                                          "snapshots need no --config, but images: --data.root")
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
        from models import make_codec
        from runners.sampling.flags import sampler_settings
        from runners.sampling.sampler import check_settings
        from runners.sampling.weights import local_weights
        from utils.writable import check_writable

        self.args, self.notes, self.left_out = args, [], []
        if args.seed < 0:
            raise UserError(f"--seed {args.seed} must be at least 0")
        if not (args.doc or args.config or args.weights):
            raise UserError("--doc is required: the names of runs under exp/logs/")
        self.file = local_weights(args.weights) if args.weights else None
        names = args.doc or [Path(args.config or self.file).stem]
        if self.file and len(names) > 1:
            raise UserError(f"--weights {args.weights} is one network, --doc names {len(names)} runs")
        if len(set(names)) < len(names):
            raise UserError("--doc names a run twice")
        self.datasets = Path(args.exp) / "datasets"
        self.runs = {name: self._open(name) for name in names}                  # name -> config, weights
        if args.command == "nll":
            self._prepare_likelihood()
        if args.command == "gamma" and args.guidance is not None:
            raise UserError("gamma is a property of the network alone: no --guidance")
        self.settings = sampler_settings(args)
        if args.command == "all" and self.settings.guidance not in (None, 1):
            self.left_out.append("gamma")
            self.notes.append("gamma is left out: it is a property of the network alone, without --guidance")
        steps = [check_settings(self.settings, config, make_codec(config)) for config, _ in self.runs.values()]
        if args.command in ("exposure", "all") and any(each != steps[0] for each in steps):
            raise UserError(f"{args.command}: these runs have chains of other times, which do not go into one table; "
                            "name them one by one")
        self.steps = steps[0]
        if args.command in ("eps-norm", "fit-eps-scaler", "all"):
            self._refuse_several_calls()
        for config, _ in self.runs.values():
            find_dataset(config, self.datasets)
        if args.command == "fit-eps-scaler":
            self._check_fit()
        self.starts = self._starts() if args.command in ("exposure", "all") else []
        self.folder = Path(args.exp) / "diagnose" / "+".join(name.replace("/", "-") for name in names)
        check_writable(self.folder / "results", "the folder of")

    def result(self, measure: str, ending: str) -> Path:
        """Of a measure's results."""
        return self.folder / f"{measure}-{self.file_label}.{ending}"

    def _run(self, name: str):
        from runners.training.checkpoint import RunFolder

        return RunFolder(Path(self.args.exp) / "logs" / safe_name("--doc", name))

    def _open(self, name: str):
        """The run's own configuration wins over --config, which must not contradict it."""
        from runners.sampling.weights import configuration_of, epoch_of

        run = self._run(name)
        config = configuration_of(run, self.args.config, self.args.overrides, self.file)
        if self.file:
            if self.args.ckpt_id is not None:
                raise UserError(f"--ckpt_id {self.args.ckpt_id} is of a run, --weights names a file; give one of them")
            if not self.file.exists():
                raise UserError(f"--weights {self.file}: no such file")
            return config, self.file
        if config.model.arch == "diffusers" and not run.path.exists():
            return config, None                                     # the pipeline as it is
        return config, run.weights(epoch_of(config, self.args.ckpt_id), self.args.model_ema)

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
            self.notes.append(f"--start_t {self.args.start_t}: the nearest times of the chain are taken, "
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
        if args.sample_type != "ddpm_noisy" or args.eps_scaler or args.classes or args.guidance is not None or \
                args.dcw or args.time_shift or args.gamma or args.var_type == "analytic":
            raise UserError("nll is of the ancestral chain and the images' own labels: no other --sample_type, no "
                            "--eps_scaler, --dcw or --time_shift, no --classes, no --guidance, no analytic variance")
        args.timesteps = args.timesteps or str(lengths[0])
        learned = all(config.model.learns_variance for config in configs)
        args.var_type = args.var_type or ("learned" if learned else "fixedlarge")

    def _refuse_several_calls(self) -> None:
        """UserError for schedulers of diffusers that call the network more than once in a step."""
        from configs.sampling import FOREIGN
        from functions.schedule import make_schedule
        from runners.sampling.schedulers import SchedulerChain

        name, (config, _) = self.settings.sample_type, next(iter(self.runs.values()))
        if name.startswith(FOREIGN) and \
                SchedulerChain(self.settings, make_schedule(config.diffusion)).calls() != len(self.steps):
            raise UserError(f"{self.args.command} needs one network call for each step, {name} makes more; take heun, "
                            "or a scheduler of one call")

    def _check_fit(self) -> None:
        if self.args.eps_scaler is not None:
            raise UserError("fit-eps-scaler searches --eps_scaler; do not give one")
        if self.args.fid_check:
            for name in self.runs:
                self.reference(name)
        elif self.args.fid_stats or self.args.inception_weights:
            raise UserError("--fid_stats and --inception_weights are for --fid_check; add it")

    def reference(self, name: str):
        from runners.evaluation.references import find_reference, source_words

        args, own = self.args, self._run(name).config
        return find_reference(self.runs[name][0], args.fid_stats, source=source_words(
            args.config or (own if own.exists() else None), args.exp, args.overrides))

    @property
    def log_time(self) -> bool:
        """Whether times are noise levels."""
        return any(config.diffusion.schedule == "sigma" for config, _ in self.runs.values())

    @property
    def file_label(self) -> str:
        """The sampler and the weights in few words, for file names: a run may be measured at several epochs."""
        files = sorted({weights.stem if weights else "pretrained" for _, weights in self.runs.values()})
        return re.sub(r"[^A-Za-z0-9.+_-]+", "-", f"{self.settings} {'+'.join(files)}").strip("-")

    def command(self, name: str, **changes: str) -> str:
        """generate.py with the sampler measured here and ``changes`` of its settings."""
        from runners.sampling.flags import flag_text

        args = self.args
        flags = {"--exp": args.exp if args.exp != "exp" else None, "--config": args.config,
                 "--doc": name if args.doc or not self.file else None, "--weights": args.weights,
                 "--ckpt_id": args.ckpt_id, "--timesteps": args.timesteps}
        kept = self.settings.model_dump(exclude_defaults=True, exclude={"timesteps", "clip_denoised"}) | changes
        flags |= {f"--{key}": flag_text(value) for key, value in kept.items()}
        words = [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]
        clip = {None: [], True: ["--clip_denoised"], False: ["--no-clip_denoised"]}[self.settings.clip_denoised]
        ema = [] if args.model_ema else ["--no-model_ema"]
        return shlex.join(["python", "generate.py", *words, *clip, *ema, *(f"--{each}" for each in args.overrides)])


def check(args):
    return Job(args)


def work(job, device):
    from runners.diagnosis.commands import MEASURES, Measured, measure
    from runners.diagnosis.measures import Diagnosis
    from runners.diagnosis.verdict import verdict
    from runners.diffusion import Diffusion
    from runners.distributed import on_rank_zero
    from runners.training.metrics_file import read_metrics

    args, verdicts = job.args, {}
    for note in job.notes:
        on_rank_zero(lambda note=note: print(note))
    commands = [name for name in MEASURES if name not in job.left_out] if args.command == "all" else [args.command]
    found = {command: ({}, {}) for command in commands}                         # rows and details by run
    for name, (config, weights) in job.runs.items():
        diffusion = Diffusion(config, device)
        diffusion.load(weights, args.model_ema)
        run = Measured(job, name, Diagnosis(
            diffusion, diffusion.open_images(job.datasets), job.settings, num_images=args.num_images, seed=args.seed,
            batch_size=args.batch_size or config.sampling.batch_size))
        for command, (rows, details) in found.items():
            rows[name], more = measure(command, run)
            details[name] = {"weights": str(weights), **asdict(diffusion.weights), **more}
        if args.command == "all":
            lines = read_metrics(Path(args.exp) / "logs" / name / "metrics.jsonl")
            verdicts[name] = verdict(config, lines, diffusion.weights.step, args.model_ema, found["eps-norm"][0][name])
    on_rank_zero(lambda: write(job, found, verdicts))


def write(job, found, verdicts):
    """MEASURE-SAMPLER.csv, .png and .json, which notes how they were made; of ``all`` the page and the verdicts."""
    from runners.diagnosis.curves import write_figure, write_table
    from runners.diagnosis.page import write_page
    from runners.diagnosis.panels import PANELS
    from utils.atomic import write_json

    args, title = job.args, f"{job.settings}; {job.args.num_images} images"
    job.folder.mkdir(parents=True, exist_ok=True)
    for command, (rows, details) in found.items():
        write_table(rows, job.result(command, "csv"))
        write_figure(title, PANELS[command](rows), job.result(command, "png"), job.log_time)
        write_json(job.result(command, "json"), {
            "measure": command, "sampler": job.settings.model_dump(mode="json"), "num_images": args.num_images,
            "seed": args.seed, "starts": job.starts if command == "exposure" else [], "runs": details})
        print(f"{job.result(command, 'csv')}\n{job.result(command, 'png')}")
    if verdicts:
        write_page(job.result("all", "html"), title, {command: rows for command, (rows, _) in found.items()}, verdicts,
                   job.log_time)
        for name, sentences in verdicts.items():
            print(f"\n{name}", *sentences, sep="\n")
        print(f"\n{job.result('all', 'html')}")


def main(argv=None) -> int:
    return run_script(__file__, argv, parse, check, work)


if __name__ == "__main__":
    sys.exit(main())
