"""A request to generate.py, checked: what to load, which images, how to sample, where to write."""

import re
from pathlib import Path

from configs.schema import load_config
from functions.rng import parse_seeds
from functions.schedule import make_schedule
from models import make_codec
from runners.cli import run_folder, safe_name
from runners.evaluation.logs import json_log
from runners.evaluation.references import MissingReference, find_reference
from runners.sampling.classifier import Classifier
from runners.sampling.flags import sampler_settings
from runners.sampling.folder import ImageFolder
from runners.sampling.pictures import open_originals
from runners.sampling.sampler import check_settings
from runners.training.checkpoint import RunFolder, refuse_differences
from utils.errors import UserError


class SamplingJob:
    """The checked request: what to load, which images, how to sample, where to write."""

    def __init__(self, args):
        self.args, self.absent = args, []
        self.config, self.weights = self._configure()
        self.settings = sampler_settings(args)
        self.guide, self.classifier = self._guide(), self._classifier()
        self.seeds = self._seeds()
        self.batch_size = args.batch_size or self.config.sampling.batch_size
        default = args.doc or Path(args.config or "images").stem
        name = args.image_folder or default
        folder = Path(name) if Path(name).is_absolute() else Path(args.exp) / "image_samples" / safe_name("-i", name)
        self.folder = ImageFolder(folder, args.subdirs)
        self.metrics = tuple(args.metrics.split(","))
        self.fid_log = Path(args.fid_log or Path(args.exp) / "fid.txt")
        json_log(self.fid_log)                               # refuses a name that is the JSON file's own
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
        return seeds

    def _guide(self):
        """(configuration, file) of the network that guides by being worse, or None."""
        path = self.args.guide_weights and Path(self.args.guide_weights)
        if not path:
            return None
        if not path.exists():
            raise UserError(f"--guide_weights {path}: no such file")
        beside = (path if path.is_dir() else path.parent) / "config.yml"
        return (load_config(beside) if beside.exists() else self.config), path

    def _classifier(self) -> Classifier | None:
        """Read here already, because its tensors tell its classes and the size of its images."""
        return Classifier(self.args.classifier, self.config.data.shape, "cpu") if self.args.classifier else None

    def _check_sampler(self) -> None:
        """Refuse settings before any work; the samplers would only refuse them on their first step."""
        args, settings, config = self.args, self.settings, self.config
        self.times = check_settings(settings, make_schedule(config.diffusion), make_codec(config),
                                    config.model, bool(self.guide),
                                    self.classifier.num_classes if self.classifier else 0)
        if args.reconstruct:
            self._check_reconstruction()
        if args.interpolation and len(self.seeds) < 2:
            raise UserError("--interpolation needs at least two seeds")
        if args.save == "none" and not args.fid and not self.grid:
            raise UserError("--save none with --no-fid and --grid 0 leaves nothing to do")
        self.notes = []
        if str(args.timesteps).isdigit() and len(self.times) != int(args.timesteps):
            self.notes.append(f"{settings.skip_type} gives {len(self.times)} distinct steps for --timesteps "
                              f"{args.timesteps}")
        recorded = getattr(config.model, "var_type", settings.var_type)
        if settings.sample_type == "ddpm_noisy" and config.model.gives_variances and settings.var_type != "learned":
            self.notes.append(f"sampling with --var_type {settings.var_type}; this network has learned its variances, "
                              "which --var_type learned uses")
        elif settings.sample_type == "ddpm_noisy" and settings.var_type != recorded:
            self.notes.append(f"sampling with --var_type {settings.var_type}; the configuration says {recorded}, which "
                              "DDIM and SA-DPM do not read either")

    def _check_reconstruction(self) -> None:
        args = self.args
        if self.settings.sample_type == "ddpm_noisy" or self.settings.eta or self.settings.churn:
            raise UserError("--reconstruct needs a chain that draws no noise: --eta 0, no --churn, not ddpm_noisy")
        found = len(open_originals(args.reconstruct, self.config))
        if max(self.seeds) >= found:
            raise UserError(f"--reconstruct {args.reconstruct} has {found} images; lower --num_samples")

    @property
    def grid(self) -> int:
        """Images of the picture; a scan with --save none draws none unless it is asked for."""
        return self.args.grid if self.args.grid is not None else 0 if self.args.save == "none" else 64

    @property
    def grid_path(self) -> Path:
        """Beside the folder; without a folder of images the settings tell the pictures of a scan apart."""
        words = "" if self.args.save != "none" else "_" + re.sub(r"[^A-Za-z0-9.+-]+", "-", str(self.settings))
        return self.folder.path.with_name(f"{self.folder.path.name}{words}_grid.png")

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
