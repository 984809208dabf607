"""Generate images from seeds, compute their FID and log it, on any number of processes."""

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from runners.cli import Parser, add_common, positive, run_folder, run_script, safe_name
from utils.errors import UserError


def parse(argv):
    parser = Parser(prog="generate.py", description=__doc__)
    add_common(parser)
    on_off = argparse.BooleanOptionalAction
    weights = parser.add_argument_group("weights")
    weights.add_argument("--ckpt_id", type=int, help="epoch (default: sampling.ckpt_id, else the newest)")
    weights.add_argument("--model_ema", action=on_off, default=True, help="averaged rather than raw weights")
    weights.add_argument("--weights", metavar="FILE", help="load this file or folder instead of a run's checkpoint")
    images = parser.add_argument_group("images")
    images.add_argument("-i", "--image_folder", help="relative: under exp/image_samples/; absolute: as given "
                                                     "(default: DOC)")
    images.add_argument("--num_samples", type=positive, help="how many (default: 50000, or as --seeds says)")
    images.add_argument("--seeds", metavar="LIST", help='such as "0-63" or "1,2,5-10" (default: 0 to num_samples - 1)')
    images.add_argument("--save", choices=["png", "npz", "none"], default="png",
                        help="none: images only pass through the metrics")
    images.add_argument("--subdirs", action="store_true", help="sub-folders of 1,000 images")
    images.add_argument("--grid", type=int, default=64, metavar="N",
                        help="picture of the first N images, beside the folder; 0: none")
    images.add_argument("--interpolation", action="store_true", help="instead: a picture of paths between 8 seeds")
    images.add_argument("--sequence", action="store_true", help="instead: a picture of the chains of 8 seeds")
    images.add_argument("--reconstruct", metavar="PATH", help="instead: encode the first images of this folder, zip or "
                        "npz by DDIM's reversed chain, decode them, write pairs and errors (--seeds: which images)")
    sampler = parser.add_argument_group("sampler")
    sampler.add_argument("--timesteps", default="1000", metavar="S", help="number of steps, ddimN, or 10,15,20")
    sampler.add_argument("--eta", type=float, default=0.0, help="0 (deterministic) to 1, for generalized")
    sampler.add_argument("--sample_type", default="generalized", help="generalized (DDIM), ddpm_noisy "
                         "(ancestral), heun or euler (EDM), dpmpp_2m (DPM-Solver++)")
    sampler.add_argument("--skip_type", default="uniform",
                         help="uniform, quad, leading, linspace, trailing, respace or edm")
    sampler.add_argument("--var_type", choices=["fixedlarge", "fixedsmall"], default="fixedlarge",
                         help="variance of ddpm_noisy")
    sampler.add_argument("--eps_scaler", metavar="B or K,B", help="divide the predicted noise by B, or by K i + B")
    sampler.add_argument("--churn", metavar="S[,MIN,MAX,NOISE]", help="EDM's S_churn, S_min, S_max and S_noise, for "
                                                                      "heun and euler")
    sampler.add_argument("--clip_denoised", action=on_off, help="clamp estimates of x0 (default: only for ddpm_noisy)")
    sampler.add_argument("--batch_size", type=positive, help="images at a time (default: sampling.batch_size)")
    sampler.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="off")
    sampler.add_argument("--compile", choices=["auto", "on", "off"], default="auto")
    fid = parser.add_argument_group("FID")
    fid.add_argument("--fid", action=on_off, default=True, help="compute it")
    fid.add_argument("--fid_log", metavar="FILE", help="log to append to, a .jsonl beside it (default: EXP/fid.txt)")
    fid.add_argument("--fid_stats", metavar="FILE", help="reference statistics (default: sampling.fid_stats); "
                                                         "auto: make them from the data set if they are missing")
    fid.add_argument("--inception_weights", metavar="FILE", help="weights of the feature network")
    fid.add_argument("--metrics", default="fid", help="comma list of fid, kid, is, pr")
    fid.add_argument("--bootstrap", type=int, default=0, metavar="N", help="95%% interval of the FID from N resamples")
    fid.add_argument("--force", action="store_true", help="compare with a reference that was made for something else")
    fid.add_argument("--preprocess", choices=["pytorch-fid", "tf1"], default="pytorch-fid")
    parser.add_argument("--dry_run", action="store_true", help="check everything, call the network once; write nothing")
    return parser.parse(argv)


class Job:
    """The checked request: what to load, which images, how to sample, where to write."""

    def __init__(self, args):
        from runners.generation import ImageFolder, parse_churn, parse_scaler

        self.args, self.absent = args, []
        self.config, self.weights = self._configure()
        self.settings = {"timesteps": args.timesteps, "eta": args.eta, "sample_type": args.sample_type,
                         "skip_type": args.skip_type, "var_type": args.var_type,
                         "eps_scaler": parse_scaler(args.eps_scaler), "clip_denoised": args.clip_denoised,
                         "churn": parse_churn(args.churn)}
        self.seeds = self._seeds()
        self.batch_size = args.batch_size or self.config.sampling.batch_size
        default = args.doc or Path(args.config or "images").stem
        name = args.image_folder or default
        folder = Path(name) if Path(name).is_absolute() else Path(args.exp) / "image_samples" / safe_name("-i", name)
        self.folder = ImageFolder(folder, args.subdirs)
        self.fid_log = Path(args.fid_log or Path(args.exp) / "fid.txt")
        self._check_sampler()

    def _configure(self):
        """The run's own configuration wins over --config, which must not contradict it."""
        from configs.schema import load_config
        from runners.checkpoint import RunFolder, refuse_differences

        args = self.args
        self.run = RunFolder(run_folder(args), Path(args.exp) / "datasets")
        stored = not args.weights and self.run.config.exists() and load_config(self.run.config)
        if not (stored or args.config):
            raise UserError(f"no configuration: {self.run.config} does not exist, and --config is not given")
        config = load_config(args.config or self.run.config, args.overrides)
        if stored:
            refuse_differences(stored, config, self.run.config)
        try:
            ckpt_id = config.sampling.ckpt_id if args.ckpt_id is None else args.ckpt_id
            weights = Path(args.weights) if args.weights else self.run.weights(ckpt_id, args.model_ema)
            if not weights.exists():
                raise UserError(f"--weights {weights}: no such file")
        except UserError as error:
            if not args.dry_run:
                raise
            self.absent.append(str(error))
            weights = None
        return config, weights

    def _seeds(self) -> list[int]:
        from functions.rng import parse_seeds

        args = self.args
        default = 8 if self.pictures else 50000
        try:
            seeds = parse_seeds(args.seeds) if args.seeds else range(args.num_samples or default)
        except ValueError as error:
            raise UserError(f"--{error}") from None
        if args.seeds and args.num_samples and len(seeds) != args.num_samples:
            raise UserError(f"--seeds names {len(seeds)} images, --num_samples asks for {args.num_samples}; give one")
        return list(seeds)

    def _check_sampler(self) -> None:
        """Refuse settings before any work; the samplers would only refuse them on their first step."""
        from functions.denoising import OPTIONS, SAMPLERS, chain, network_calls
        from functions.schedule import NoiseSchedule
        from functions.timesteps import sampling_timesteps
        from utils.errors import choose

        args, schedule = self.args, NoiseSchedule.from_config(self.config.diffusion)
        choose(SAMPLERS, args.sample_type, "--sample_type")
        if not 0 <= args.eta <= 1:
            raise UserError(f"--eta {args.eta} is not in [0, 1]")
        try:
            steps = sampling_timesteps(schedule.num_timesteps, args.timesteps, args.skip_type, schedule)
            next(chain(schedule, steps, self.settings["eps_scaler"]))
        except ValueError as error:
            raise UserError(f"--timesteps {args.timesteps}, --skip_type {args.skip_type}: {error}") from None
        self.calls = network_calls(args.sample_type, len(steps))            # for each image
        if args.churn and "churn" not in OPTIONS[args.sample_type]:
            raise UserError(f"--churn is for heun and euler, not for {args.sample_type}")
        if args.reconstruct:
            self._check_reconstruction()
        if args.interpolation and len(self.seeds) < 2:
            raise UserError("--interpolation needs at least two seeds")
        if args.save == "none" and not args.fid and not args.grid:
            raise UserError("--save none with --no-fid and --grid 0 leaves nothing to do")
        self.notes = []
        if args.timesteps.isdigit() and len(steps) != int(args.timesteps):
            self.notes.append(f"{args.skip_type} gives {len(steps)} distinct steps for --timesteps {args.timesteps}")
        if args.sample_type == "ddpm_noisy" and args.var_type != self.config.model.var_type:
            self.notes.append(f"sampling with --var_type {args.var_type}; the configuration says "
                              f"{self.config.model.var_type}, which DDIM and SA-DPM do not read either")

    def _check_reconstruction(self) -> None:
        from runners.pictures import open_originals

        args = self.args
        if args.sample_type == "ddpm_noisy" or args.eta or args.churn:
            raise UserError("--reconstruct needs a chain that draws no noise: --eta 0, no --churn, not ddpm_noisy")
        found = len(open_originals(args.reconstruct, self.config))
        if max(self.seeds) >= found:
            raise UserError(f"--reconstruct {args.reconstruct} has {found} images; lower --num_samples")

    @property
    def seed_text(self) -> str:
        return self.args.seeds or f"0-{len(self.seeds) - 1}"

    @property
    def pictures(self) -> bool:
        return bool(self.args.interpolation or self.args.sequence or self.args.reconstruct)

    def reference(self):
        """The checked FID reference, or None where no FID is wanted."""
        from runners.evaluation import MissingReference, find_reference

        args = self.args
        if not args.fid or self.pictures:
            return None
        try:
            return find_reference(self.config, None if args.fid_stats == "auto" else args.fid_stats, args.preprocess,
                                  args.force, args.config or str(self.run.config))
        except MissingReference as error:
            if not (args.dry_run or args.fid_stats == "auto"):
                raise
            self.absent.append(str(error))
            return None


def check(args):
    job = Job(args)
    if job.weights or args.dry_run:
        job.reference()


def work(args, device):
    from runners.diffusion import Diffusion
    from runners.distributed import on_rank_zero
    from runners.dry_run import dry_run_sampling
    from runners.network import explain_out_of_memory, resolve_amp, resolve_compile
    from utils.locks import lock_folder

    job = Job(args)
    for note in job.notes:
        on_rank_zero(lambda note=note: print(note))
    amp = resolve_amp(args.amp, device)
    if args.dry_run:
        job.reference()
        return dry_run_sampling(job, device)
    diffusion = Diffusion(job.config, device)
    diffusion.load(job.weights, args.model_ema)
    diffusion.amp = amp
    diffusion.compiled = resolve_compile(args.compile, device, job.calls * len(job.seeds) // job.batch_size)
    with ExitStack() as held:
        on_rank_zero(lambda: held.enter_context(lock_folder(job.folder.path)))
        if job.pictures:
            return on_rank_zero(lambda: draw_pictures(job, diffusion))
        with explain_out_of_memory():
            produce(job, diffusion)


def draw_pictures(job, diffusion):
    from runners.monitor import save_png
    from runners.pictures import interpolation_grid, reconstruct, sequence_grid

    for wanted, name, draw in ((job.args.interpolation, "interpolation", interpolation_grid),
                               (job.args.sequence, "sequence", sequence_grid)):
        if wanted:
            path = job.folder.path.with_name(f"{job.folder.path.name}_{name}.png")
            save_png(draw(diffusion, job.seeds, job.settings), path)
            print(path)
    if job.args.reconstruct:
        reconstruct(diffusion, job.args.reconstruct, job.seeds, job.settings, job.batch_size, job.folder.path)


def produce(job, diffusion):
    """Make the images, feed the metrics, write the grid and the log."""
    from runners import generation
    from runners.distributed import on_rank_zero

    args, started = job.args, time.perf_counter()
    evaluation = open_evaluation(job, diffusion.device)
    if args.save != "none":
        manifest = generation.manifest_of(diffusion, job.settings, args.amp)
        if args.save == "npz":                       # rows have no names: which seed is where is part of the request
            manifest["seeds"] = job.seed_text
        on_rank_zero(lambda: job.folder.prepare(manifest))
    writer = {"png": lambda: generation.PngWriter(job.folder, job.config.data.shape),
              "npz": lambda: generation.NpzWriter(job.folder.path, len(job.seeds), job.config.data.shape),
              "none": generation.NoWriter}[args.save]()
    shown = {}
    for start, seeds, images in generation.generate(diffusion, job.seeds, job.settings, job.batch_size, writer):
        if evaluation:
            evaluation.update(images, list(range(start, start + len(seeds))))
        shown.update((start + i, images[i]) for i in range(len(seeds)) if start + i < args.grid)
    if args.grid:
        path = job.folder.path.with_name(f"{job.folder.path.name}_grid.png")
        generation.write_grid(shown, path)
        on_rank_zero(lambda: print(f"grid    {path}"))
    if args.save != "none":
        on_rank_zero(lambda: print(f"images  {job.folder.path}"))
    if evaluation:
        results = evaluation.results()
        on_rank_zero(lambda: report(job, diffusion, results, time.perf_counter() - started))


def open_evaluation(job, device):
    """The metrics, with their reference, or None; ``--fid_stats auto`` makes a reference that is missing."""
    from models.inception import load_inception
    from runners.evaluation import Evaluation, make_reference

    args = job.args
    if not args.fid:
        return None
    reference = job.reference()
    net = load_inception(args.inception_weights, device, args.preprocess)
    if reference is None:
        features = any(metric in args.metrics for metric in ("kid", "pr"))
        reference = make_reference(job.config, net, root=job.run.datasets, keep_features=features)
    return Evaluation(reference, net, tuple(args.metrics.split(",")), bootstrap=args.bootstrap)


def report(job, diffusion, results, seconds):
    from runners.evaluation import append_log, summary

    weights = diffusion.weights
    details = {
        "weights": str(job.weights), "weights_fingerprint": weights.fingerprint, "weights_kind": weights.kind,
        "step": weights.step, "epoch": weights.epoch, "sampler": job.settings, "network_calls": job.calls,
        "seeds": job.seed_text, "batch_size": job.batch_size, "amp": job.args.amp,
        "device": str(diffusion.device), "compiled": diffusion.compiled, "seconds": round(seconds, 2),
        "comment": job.args.comment,
    }
    append_log(job.fid_log, job.weights, results, details)
    print(summary(results))
    print(f"log     {job.fid_log}")


def main(argv=None) -> int:
    return run_script(__file__, argv, parse, check, work)


if __name__ == "__main__":
    sys.exit(main())
