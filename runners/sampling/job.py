"""A request to generate.py, checked: what to load, which images, how to sample, where to write."""

from pathlib import Path

from configs.schema import load_config
from functions.denoising import OPTIONS, SAMPLERS, chain, network_calls
from functions.rng import parse_seeds
from functions.schedule import NoiseSchedule
from functions.timesteps import sampling_timesteps
from runners.cli import run_folder, safe_name
from runners.evaluation.references import MissingReference, find_reference
from runners.sampling.generation import ImageFolder, parse_churn, parse_scaler
from runners.sampling.pictures import open_originals
from runners.training.checkpoint import RunFolder, refuse_differences
from utils.errors import UserError, choose


class SamplingJob:
    """The checked request: what to load, which images, how to sample, where to write."""

    def __init__(self, args):
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
        self.metrics = tuple(args.metrics.split(","))
        self.fid_log = Path(args.fid_log or Path(args.exp) / "fid.txt")
        if self.fid_log.suffix == ".jsonl":
            raise UserError(f"--fid_log {self.fid_log}: name the text file, such as fid.txt; its .jsonl follows")
        self._check_sampler()

    def _configure(self):
        """The run's own configuration wins over --config, which must not contradict it."""
        args = self.args
        self.run = RunFolder(run_folder(args), Path(args.exp) / "datasets")
        if not (args.config or self.run.config.exists()):
            raise UserError(f"no configuration: {self.run.config} does not exist, and --config is not given")
        config = load_config(args.config or self.run.config, args.overrides)
        if self.run.config.exists() and not args.weights:
            refuse_differences(load_config(self.run.config), config, self.run.config)
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
