"""Train a diffusion model with the sequence-aware loss and input perturbation, on any number of processes."""

import logging
import sys
from pathlib import Path

from runners.cli import Parser, add_common, positive, run_folder, run_script

log = logging.getLogger(__name__)


def parse(argv):
    parser = Parser(prog="train_ddp.py", description=__doc__)
    add_common(parser)
    parser.add_argument("--num_consecutive_steps", type=int, metavar="K",
                        help="steps of the sequence-aware loss (default: loss.num_consecutive_steps of the config)")
    parser.add_argument("--lamda", type=float, metavar="L", help="weight of its sequence term (default: loss.lamda)")
    parser.add_argument("--input_perturbation", "--input_pertub", type=float, metavar="GAMMA",
                        help="perturb the network input (default: loss.input_perturbation)")
    parser.add_argument("--seed", type=int, help="weights, data order and noise (default: training.seed, 1024)")
    parser.add_argument("--resume_training", action="store_true",
                        help="continue from the newest checkpoint; in an empty run folder start fresh")
    parser.add_argument("--overwrite", action="store_true", help="move an existing run folder aside and start anew")
    parser.add_argument("--force", action="store_true", help="with --resume_training: go on although the images, or "
                        "the weights beside adapters, are others than those of the checkpoint")
    parser.add_argument("--init_from", metavar="FILE", help="start from these weights, in any format generate.py "
                                                            "reads, or from those of this run folder")
    parser.add_argument("--keep_optimizer", action="store_true",
                        help="with --init_from: also take over the optimizer's moments; K, lamda, ... may be others")
    parser.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], help="precision (default: training.amp)")
    parser.add_argument("--compile", choices=["auto", "on", "off"], help="torch.compile (default: training.compile)")
    parser.add_argument("--max_steps", type=positive, metavar="N", help="stop after so many steps of the run")
    parser.add_argument("--dry_run", action="store_true",
                        help="check everything, take one step with one image, print sizes; write nothing")
    return parser.parse(argv)


FLAG_KEYS = {"num_consecutive_steps": "loss.num_consecutive_steps", "lamda": "loss.lamda",
             "input_perturbation": "loss.input_perturbation", "seed": "training.seed", "amp": "training.amp",
             "compile": "training.compile"}


def configure(args):
    """The configuration that file, overrides and flags describe, flags win, and the run folder; read once."""
    if "configured" not in args:
        args.configured = read_configuration(args)
    return args.configured


def read_configuration(args):
    from configs.schema import load_config
    from runners.training.checkpoint import RunFolder
    from utils.errors import UserError

    folder = run_folder(args)
    source = args.config or (args.resume_training and (folder / "config.yml").exists() and folder / "config.yml")
    if not source:
        raise UserError("--config is required: a file, or a name in configs/ such as digits.yml")
    flags = [f"{key}={getattr(args, flag)}" for flag, key in FLAG_KEYS.items() if getattr(args, flag) is not None]
    return load_config(source, [*args.overrides, *flags]), RunFolder(folder, f"{args.exp}/datasets", args.comment)


def check(args):
    """Everything that can be refused before a process starts or a file is touched."""
    from datasets import check_held_out, find_dataset
    from runners.distributed import restarted
    from runners.training.dry_run import check_training
    from utils.errors import UserError
    from utils.writable import check_writable

    config, run = configure(args)
    check_training(config, args)
    if (args.num_consecutive_steps or 0) > 1 and args.lamda is None and config.loss.lamda == 0:
        raise UserError(f"--num_consecutive_steps {args.num_consecutive_steps} without effect: loss.lamda is 0, the "
                        "plain loss; give --lamda as well, such as --lamda 1 (SA-DPM's default)")
    if args.keep_optimizer and not args.init_from:
        raise UserError("--keep_optimizer needs --init_from: the run whose moments are taken over")
    if args.force and not mode(args)["resume"]:
        raise UserError("--force needs --resume_training: it is about the images that a run goes on with")
    if args.init_from:
        starting_point(args)
        if args.resume_training and run.full_states() and not restarted():
            raise UserError(f"--init_from {args.init_from} with --resume_training: {run.path} holds a checkpoint to go "
                            "on from; leave out --init_from, or choose another --doc")
    check_writable(run.path, "the run")
    if not args.dry_run:
        run.check(config, **mode(args))
        find_dataset(config, run.datasets, download=True)
        if config.training.validation_freq:
            check_held_out(config, run.datasets)
        if config.training.fid_freq:
            from runners.evaluation.references import find_reference, source_words

            find_reference(config, source=source_words(args.config or run.config, args.exp, args.overrides))
    return args


def starting_point(args) -> Path:
    """The file or diffusers folder that --init_from means; of a run folder its newest full state or weights."""
    from runners.training.checkpoint import RunFolder
    from utils.errors import UserError

    path = Path(args.init_from)
    if not path.exists():
        raise UserError(f"--init_from {path}: no such file")
    run = RunFolder(path)
    if path.is_dir() and args.keep_optimizer:
        if not run.full_states():
            raise UserError(f"--init_from {path} --keep_optimizer: no full state such as ckpt.pth lies there")
        return run.full_states()[0]
    return run.weights() if path.is_dir() and (run.full_states() or run.averages()) else path


def mode(args) -> dict:
    """What to do with an existing run folder; ranks that were started again continue what they began."""
    from runners.distributed import restarted

    again = restarted()
    return {"resume": args.resume_training or again, "overwrite": args.overwrite and not again}


def work(args, device):
    from runners.diffusion import Diffusion
    from runners.distributed import on_rank_zero
    from runners.training.checkpoint import prepared
    from runners.training.dry_run import dry_run_training

    config, run = configure(args)
    if args.dry_run:
        return dry_run_training(config, run, device, args.init_from and starting_point(args))
    diffusion = Diffusion(config, device)
    resume = mode(args)["resume"]
    if args.init_from and not (resume and run.full_states()):
        begin_from(diffusion, starting_point(args), args.keep_optimizer)
    diffusion.open_training_images(run)                # bad data are refused before the run folder is touched
    with prepared(run, config, **mode(args), judge=diffusion.judge(run, args.force) if resume else None):
        result = diffusion.train(run, resume=resume, force=args.force, max_steps=args.max_steps)
    on_rank_zero(lambda: print(f"step {result.step}, epoch {result.epoch}: {result.checkpoint}"))


def begin_from(diffusion, path: Path, keep_optimizer: bool) -> None:
    """Load the weights of --init_from, and say which they are; or all that a full state holds."""
    if keep_optimizer:
        return diffusion.inherit(path)
    diffusion.load(path)
    kinds = {"ema": "EMA weights", "raw": "raw weights", "unknown": "weights (it does not say whether EMA or raw)"}
    step = diffusion.weights.step
    log.info("starting from the %s of %s%s", kinds.get(diffusion.weights.kind, diffusion.weights.kind), path,
             "" if step is None else f", step {step}")


def main(argv=None) -> int:
    return run_script(__file__, argv, parse, check, work)


if __name__ == "__main__":
    sys.exit(main())
