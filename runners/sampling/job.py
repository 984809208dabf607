"""A request to generate.py, checked: what to load, which images, how to sample, where to write."""

import re
from collections.abc import Sequence
from math import isclose
from pathlib import Path

from configs.pipelines import is_pipeline
from configs.sampling import FOREIGN
from configs.schema import load_config
from functions.rng import LAST_SEED, parse_seeds
from functions.schedule import make_schedule
from models import make_codec
from runners.cli import run_folder
from runners.conditioning import numbered
from runners.evaluation.logs import check_log
from runners.evaluation.references import MissingReference, find_reference, source_words
from runners.sampling.classifier import Classifier
from runners.sampling.flags import sampler_settings
from runners.sampling.folder import ImageFolder
from runners.sampling.gamma import read_gamma
from runners.sampling.pictures import open_originals
from runners.sampling.prompts import SEEDS_OF_A_PROMPT, read_prompts
from runners.sampling.sampler import check_gamma, check_settings
from runners.sampling.weights import configuration_of, epoch_of, local_weights, stored_config
from runners.training.checkpoint import RunFolder
from utils.errors import UserError
from utils.names import safe_name
from utils.writable import check_writable

MOST_ROWS = 256                                              # of a picture


def same_chain(a, b) -> bool:
    """Whether times mean the same noise in two schedules."""
    count = getattr(a, "num_timesteps", None)
    return type(a) is type(b) and (count is None or count == b.num_timesteps and all(
        isclose(a.level(t), b.level(t), rel_tol=1e-6) for t in range(count)))


class SamplingJob:
    """The checked request: what to load, which images, how to sample, where to write."""

    def __init__(self, args):
        self.args, self.absent = args, []
        self.config, self.weights = self._configure()
        self.prompts = self._prompts()
        args.timesteps = args.timesteps or str(min(30 if self.prompted else 1000, self.config.diffusion.chain_length))
        self.settings = sampler_settings(args)
        self.guide, self.classifier = self._guide(), self._classifier()
        self.per_prompt = self._seeds()
        self.seeds = numbered(max(1, len(self.prompts)), self.per_prompt)
        self.batch_size = args.batch_size or self.config.sampling.batch_size
        default = args.doc or Path(args.config or self.weights or args.weights or "images").stem
        name = args.image_folder or default
        folder = Path(name) if Path(name).is_absolute() else Path(args.exp) / "image_samples" / safe_name("-i", name)
        if not folder.name:
            raise UserError(f"-i {name}: name a folder in it")
        self.folder = ImageFolder(folder, args.subdirs, max(1, len(self.prompts)))
        self.metrics = tuple(args.metrics.split(","))
        self.fid_log = Path(args.fid_log or Path(args.exp) / "fid.txt")
        self.notes, self._reference = [], None
        if args.ema_length is not None:
            self._check_average()
        if not args.export:
            self._check_sampler()
        self._check_outputs()
        self._refuse_unread()

    def _refuse_unread(self) -> None:
        """UserError for a flag that others leave without effect."""
        args, unguided = self.args, self.args.guidance in (None, 1) or self.args.guide_weights
        problems = {"--interval is FID's; add fid to --metrics": args.interval and "fid" not in self.metrics,
                    f"--subdirs sorts PNG files, of which --save {args.save} writes none": args.subdirs
                    and args.save != "png",
                    "--negative_prompt is what --guidance leads away from; give --guidance above 1, and no "
                    "--guide_weights": args.negative_prompt is not None and unguided}
        for problem, found in problems.items():
            if found:
                raise UserError(problem)

    def _check_outputs(self) -> None:
        if self.args.export:
            check_writable(self.args.export, "--export")
            return
        if self.args.save != "none" or self.grid or self.pictures:
            check_writable(self.folder.path, "-i")               # lock and pictures lie beside it
        if self.wants_fid and not self.pictures:
            check_log(self.fid_log)

    def _configure(self):
        """The run's own configuration wins over --config, which must not contradict it."""
        args = self.args
        file = local_weights(args.weights) if args.weights else None
        pipeline = file if file and is_pipeline(file) else None
        alone = file and not (args.doc or args.config)
        self.run = RunFolder(Path(args.exp) / "logs" / file.stem if alone else run_folder(args),
                             Path(args.exp) / "datasets")
        if pipeline:
            stored = self.run.config if self.run.config.exists() and not alone else pipeline
            config = load_config(args.config or stored, args.overrides, pipeline)
        else:
            config = configuration_of(self.run, args.config, args.overrides, file)
        if config.model.arch == "diffusers" and (pipeline or not file and not self.run.path.exists()):
            return self._configure_pipeline(config)
        if file and args.ckpt_id is not None:
            raise UserError(f"--ckpt_id {args.ckpt_id} is of a run, --weights names a file; give one of them")
        try:
            weights = file or self.run.weights(epoch_of(config, args.ckpt_id), args.model_ema)
            if not weights.exists():
                raise UserError(f"--weights {weights}: no such file")
        except UserError as error:
            if not args.dry_run:
                raise
            self.absent.append(str(error))
            weights = None
        return config, weights

    def _configure_pipeline(self, config):
        """A pipeline as it is (weights None), or as the base of what the run has trained."""
        if not self.args.doc:
            return config, None
        return config, self.run.weights(epoch_of(config, self.args.ckpt_id), self.args.model_ema)

    @property
    def weights_name(self) -> str:
        """What was loaded, for logs."""
        return str(self.weights or getattr(self.config.model, "pretrained", None))

    def _prompts(self) -> list[str]:
        """The prompts of a text-to-image network.

        Raises:
            UserError: None given, or some for a network that takes none.
        """
        args, model = self.args, self.config.model
        self.prompted = model.prompted
        given = bool(args.prompt or args.prompt_file or args.negative_prompt)
        if given and not self.prompted:
            raise UserError(f"--prompt: the network of {self.weights_name} takes no text")
        if not self.prompted or args.export:
            return []
        if args.prompt and args.prompt_file:
            raise UserError("--prompt and --prompt_file exclude each other")
        if not (args.prompt or args.prompt_file):
            raise UserError("this network makes images of text: give --prompt or --prompt_file")
        return args.prompt or read_prompts(args.prompt_file)

    def _seeds(self) -> Sequence[int]:
        args = self.args
        if (args.num_samples or 0) > LAST_SEED + 1:
            raise UserError(f"--num_samples {str(args.num_samples)[:40]}: at most {LAST_SEED + 1}, the number of seeds")
        default = 8 if self.pictures else SEEDS_OF_A_PROMPT if self.prompts else 50000
        try:
            seeds = parse_seeds(args.seeds) if args.seeds else range(args.num_samples or default)
        except ValueError as error:
            raise UserError(f"--{error}") from None
        if args.seeds and args.num_samples and len(seeds) != args.num_samples:
            raise UserError(f"--seeds names {len(seeds)} images, --num_samples asks for {args.num_samples}; give one")
        return seeds

    def _guide(self):
        """(configuration, file) of the network that guides by being worse, or None."""
        path = self.args.guide_weights and local_weights(self.args.guide_weights)
        if not path:
            return None
        if not path.exists():
            raise UserError(f"--guide_weights {path}: no such file")
        beside = (path if path.is_dir() else path.parent) / "config.yml"
        config = stored_config(path) or (load_config(beside) if beside.exists() else self.config)
        self._refuse_guide(config)
        return config, path

    def _refuse_guide(self, guide) -> None:
        """UserError where the other network would be shown what it does not know."""
        wrong = [key for key in ("image_size", "channels", "rescaled", "logit_transform")
                 if getattr(guide.data, key) != getattr(self.config.data, key)]
        if not same_chain(make_schedule(self.config.diffusion), make_schedule(guide.diffusion)):
            wrong.append("the chain")
        if wrong:
            raise UserError(f"--guide_weights {self.args.guide_weights} is another kind of network, it differs in "
                            f"{', '.join(wrong)}; it must differ in its weights only, or in its size")

    def _classifier(self) -> Classifier | None:
        """Read here already, because its tensors tell its classes and the size of its images."""
        return Classifier(self.args.classifier, self.config.data.shape) if self.args.classifier else None

    def _check_sampler(self) -> None:
        """Refuse settings before any work; the samplers would only refuse them on their first step."""
        args, settings, config = self.args, self.settings, self.config
        schedule = make_schedule(config.diffusion)
        self.times = check_settings(settings, config, make_codec(config),
                                    guide_labels=self.guide[0].model.num_labels if self.guide else None,
                                    num_classes=self.classifier.num_classes if self.classifier else 0)
        if settings.gamma:
            check_gamma(read_gamma(settings.gamma), self.times)
        if args.reconstruct:
            self._check_reconstruction()
        if args.interpolation and len(self.seeds) < 2:
            raise UserError("--interpolation needs at least two seeds")
        if args.interpolation and len(self.prompts) > 1:
            raise UserError(f"--interpolation goes from seed to seed of one prompt; {len(self.prompts)} are given")
        if (args.interpolation or args.sequence) and len(self.seeds) > MOST_ROWS:
            raise UserError(f"--interpolation and --sequence draw a row for each seed: {len(self.seeds):,} asked for, "
                            f"at most {MOST_ROWS}")
        if args.save == "none" and not (self.wants_fid or self.grid or self.pictures):
            raise UserError("--save none with --no-fid and --grid 0 leaves nothing to do")
        if str(args.timesteps).isdigit() and len(self.times) != int(args.timesteps):
            self.notes.append(f"{settings.skip_type or schedule.skip_type} gives {len(self.times)} distinct steps for "
                              f"--timesteps {args.timesteps}")
        if settings.guidance not in (None, 1) and not self.guide and config.model.num_labels and \
                not config.training.label_dropout:
            self.notes.append(f"--guidance {settings.guidance:g} leads away from images without a class, which this "
                              "network was not trained to make (training.label_dropout 0)")
        start = schedule.level(self.times[-1])
        if settings.sigma_max and start < 0.99 * settings.sigma_max:
            self.notes.append(f"the chain starts from level {start:.4g}, not from --sigma_max {settings.sigma_max:g}, "
                              "which this network does not know")
        recorded = getattr(config.model, "var_type", settings.var_type)
        if settings.sample_type == "ddpm_noisy" and config.model.learns_variance and settings.var_type != "learned":
            self.notes.append(f"sampling with --var_type {settings.var_type}; this network has learned its variances, "
                              "which --var_type learned uses")
        elif settings.sample_type == "ddpm_noisy" and settings.var_type != recorded:
            self.notes.append(f"sampling with --var_type {settings.var_type}; model.var_type {recorded} of the "
                              "configuration is not used, as in DDIM and SA-DPM")

    def _check_average(self) -> None:
        args = self.args
        if args.weights or not args.model_ema:
            raise UserError("--ema_length makes an average out of those that the run has kept: no --weights, no "
                            "--no-model_ema")
        self.run.profiles(epoch_of(self.config, args.ckpt_id))

    def _check_reconstruction(self) -> None:
        args = self.args
        settings = self.settings
        if settings.sample_type == "ddpm_noisy" or settings.eta or settings.churn or settings.restart or settings.gamma:
            raise UserError("--reconstruct needs a chain that draws no noise: --eta 0, no --churn, --restart or "
                            "analytic variance, not ddpm_noisy")
        if settings.sample_type.startswith(FOREIGN) or settings.classifier_scale:
            raise UserError("--reconstruct runs a chain of this program up and down: no diffusers: scheduler, no "
                            "--classifier")
        if make_schedule(self.config.diffusion).alpha(self.times[-1]) == 0:
            raise UserError("--reconstruct: this chain starts from noise alone, in which nothing of an image is left; "
                            "choose steps that end below, such as --skip_type leading")
        found = len(open_originals(args.reconstruct, self.config))
        if len(self.seeds) > found or max(self.seeds) >= found:
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
        return self.args.seeds or f"0-{len(self.per_prompt) - 1}"

    @property
    def wants_fid(self) -> bool:
        """Images of a few prompts are compared with nothing unless a reference is named."""
        return self.args.fid and not self.args.export and bool(self.args.fid_stats or not self.prompts)

    @property
    def pictures(self) -> bool:
        return bool(self.args.interpolation or self.args.sequence or self.args.reconstruct)

    def reference(self):
        """The checked FID reference, read once; None where no FID is wanted, or where it is missing and may be."""
        if self._reference is None and self.wants_fid and not self.pictures:
            self._reference = self._find_reference()
        return self._reference

    def _find_reference(self):
        args = self.args
        config = args.config or (self.run.config if self.run.config.exists() else None)
        try:
            return find_reference(self.config, None if args.fid_stats == "auto" else args.fid_stats, args.preprocess,
                                  args.force, source_words(config, args.exp, args.overrides))
        except MissingReference as error:
            if not (args.dry_run or args.fid_stats == "auto"):
                raise
            self.absent.append(str(error))
            return None
