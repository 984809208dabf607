"""What all scripts share: flags, overrides, one-line errors with exit codes, and starting or joining processes."""

import argparse
import difflib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from utils.errors import Interrupted, UserError
from utils.interrupts import Terminated, terminable
from utils.memory import keep_freed_memory
from utils.names import safe_name
from utils.text import LineFormatter, escape_control

log = logging.getLogger("sa-ddim")


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds "(default: ...)" where there is one to tell and the text does not tell it itself."""

    def _get_help_string(self, action):
        none = action.default is None or action.default is False or action.default == ""        # 0 is a default
        told = none or "default" in (action.help or "")
        return action.help if told else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with errors as UserError, defaults in the help and no guessing of abbreviated flags."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpWithDefaults, **kwargs)

    def error(self, message):
        raise UserError(f"{message}; see --help")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse flags; ``--section.key value`` pairs end up in ``args.overrides`` as "section.key=value"."""
        if any("\0" in word for word in argv):
            raise UserError("an argument holds a null byte")
        argv, overrides = split_overrides(argv)
        args, unknown = self.parse_known_args(joined(argv))
        if unknown:
            raise UserError(f"unknown argument {unknown[0]!r}; {self._suggest(unknown[0])}")
        args.overrides = overrides
        return args

    def _suggest(self, word: str) -> str:
        """What may have been meant: a flag, a key of the configuration without its section, a configuration."""
        from configs.schema import dotted_keys  # imports pydantic, which only such an error has to await

        name, takes_config = word.partition("=")[0].lstrip("-"), "--config" in self._option_string_actions
        flags = {flag.lstrip("-"): flag for flag in self._option_string_actions}
        close = [flags[each] for each in difflib.get_close_matches(name, flags, n=1)]
        keys = [f"--{key}" for key in dotted_keys() if takes_config and key.endswith(f".{name}")]
        if takes_config and word.endswith((".yml", ".yaml")):
            return f"did you mean --config {word}?"
        return f"did you mean {' or '.join(keys or close)}?" if keys or close else "see --help"


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take ``--a.b value`` and ``--a.b=value`` out of ``argv``."""
    rest, overrides, tokens = [], [], iter(argv)
    for token in tokens:
        match = re.fullmatch(r"--([A-Za-z_]\w*\.[A-Za-z_]\w*)(?:=(.*))?", token, re.DOTALL)
        if not match:
            rest.append(token)
            continue
        value = match[2] if match[2] is not None else next(tokens, None)
        if value is None:
            raise UserError(f"{token}: a value must follow")
        overrides.append(f"{match[1]}={value}")
    return rest, overrides


def joined(argv: Sequence[str]) -> list[str]:
    """``--dcw -0.05,0.01`` as ``--dcw=-0.05,0.01``: argparse takes lists that begin with a minus for flags."""
    words = []
    for word in argv:
        if re.match(r"-\.?\d", word) and words and re.fullmatch(r"--\w+", words[-1]):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def add_common(parser: argparse.ArgumentParser, *, config: bool = True, processes: bool = True) -> None:
    """Flags of every script; without ``config`` no configuration and run, without ``processes`` no device or ranks."""
    if config:
        parser.add_argument("--config", metavar="NAME.yml", help="file, or a name in configs/; any key of it can be "
                                                                 "overridden: --training.batch_size 64")
        parser.add_argument("--doc", help="name of the run: exp/logs/DOC (default: the name of the config)")
        parser.add_argument("--comment", default="", help="free text, kept in the log")
    parser.add_argument("--exp", default="exp", help="folder of runs, images and data sets")
    parser.add_argument("--verbose", default="info", choices=["debug", "info", "warning", "critical"],
                        help="least important messages that are shown")
    parser.add_argument("--ni", action="store_true", help="accepted for compatibility: nothing is ever asked")
    if not processes:
        return
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"],
                        help="auto: the GPU if there is one")
    group = parser.add_argument_group("processes")
    group.add_argument("--num_process_per_node", type=positive, default=1, metavar="N",
                       help="ranks to start on this node; not used under torchrun, accelerate, srun or mpirun")
    group.add_argument("--num_proc_node", type=positive, default=1, metavar="N", help="number of nodes")
    group.add_argument("--node_rank", type=natural, default=0, help="index of this node")
    group.add_argument("--max_restarts", type=natural, default=0, metavar="N",
                       help="start the ranks anew, resuming, after a failure, at most so many times")
    group.add_argument("--dist_timeout", type=positive, default=30, metavar="MINUTES",
                       help="how long ranks wait for one another")
    group.add_argument("--master_address", default=None, help="host of rank 0")
    group.add_argument("--master_port", type=port, default=None, help="default: free on one node, 29500 on several")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, given {text}")
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, given {text}")
    return value


def port(text: str) -> int:
    if not 0 <= int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"must be in [0, 65535], given {text}")
    return int(text)


positive.__name__ = natural.__name__ = port.__name__ = "whole number"             # argparse puts it into its messages


def run_folder(args) -> Path:
    """exp/logs/DOC; DOC defaults to the stem of --config."""
    if args.doc is None and not args.config:
        raise UserError("--doc is required, the name of a run under exp/logs/; or --config NAME.yml")
    return Path(args.exp) / "logs" / safe_name("--doc", Path(args.config).stem if args.doc is None else args.doc)


def guarded(script: str, job: Callable, is_told: Callable = lambda error: False) -> int:
    """Call ``job()`` and return its exit code; an error of the user's is one line unless ``is_told(it)``."""
    try:
        return job() or 0
    except SystemExit as done:                     # --help
        return done.code or 0
    except KeyboardInterrupt as stop:
        signum = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        error = Interrupted(signum, f"stopped by {signum.name}")
        if not is_told(error):
            _complain(script, error)
        return error.code
    except UserError as error:
        if not is_told(error):
            _complain(script, error)
        return error.code
    except ModuleNotFoundError as error:           # Python of the system instead of .venv
        if Path(__file__).parents[1].joinpath(*(error.name or "").split(".")[:1]).exists():
            raise                                  # a module of this project: a bug
        _complain(script, f"the package {error.name} is not installed for {sys.executable}; `make install` makes .venv "
                          "with all that is needed, `. .venv/bin/activate` uses it")
        return 2
    except OSError as error:                       # no room, no right, no such device: not a bug either
        if error.errno is None or isinstance(error, ConnectionError):
            raise
        log.debug("", exc_info=True)
        _complain(script, f"{error.filename or 'a file'}: {error.strerror}")
        return 3


def _complain(script: str, problem) -> None:
    with suppress(OSError):                        # standard error may lie on the full disk, too
        print(f"{Path(script).name}: {escape_control(' '.join(str(problem).splitlines()))}", file=sys.stderr)


def run_script(script: str, argv: Sequence[str] | None, parse: Callable, check: Callable, work: Callable) -> int:
    """The life of a script.

    ``parse(argv) -> args``; ``check(args) -> request`` validates all that can be without processes and returns what it
    has read; ``work(request, device)`` does the job on each rank. Without a launcher and with several processes asked
    for, this process checks and then starts the ranks.

    Returns:
        Exit code. A UserError is printed as one line on standard error, by rank 0 where all ranks have it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    world, shared = None, True

    def job():
        nonlocal world, shared
        args = parse(argv)
        from runners import distributed  # imports torch, which --help and a wrong flag need not await
        from runners.network import explain_out_of_memory

        world = distributed.detect()
        setup_logging(args.verbose, world.rank if world else 0)
        if args.node_rank >= args.num_proc_node:
            raise UserError(f"--node_rank {args.node_rank} must be below --num_proc_node {args.num_proc_node}")
        with quiet() if distributed.launched() else nullcontext():        # our launcher has said all that there is
            request = check(args)
        if world is None and (args.num_process_per_node * args.num_proc_node > 1 or args.max_restarts):
            if args.device != "cpu" and distributed.pick_device(args.device, distributed.World()).type == "cuda":
                distributed.check_gpus(args.num_process_per_node)
            from runners.launcher import launch

            return launch(script, argv, processes=args.num_process_per_node, nodes=args.num_proc_node,
                          node_rank=args.node_rank, address=args.master_address, port=args.master_port,
                          max_restarts=args.max_restarts)
        device = distributed.pick_device(args.device, world or distributed.World())
        shared = False
        if device.type == "cpu":
            keep_freed_memory()
        with (distributed.process_group(world, device, args.master_address, args.master_port, args.dist_timeout),
              explain_out_of_memory(), nullcontext() if world and world.size > 1 else terminable()):
            return work(request, device)

    code = guarded(script, job, lambda error: world and world.rank and (shared or error.on_all_ranks))
    if world and world.size > 1:
        from runners.distributed import leave

        leave(code)
    return code


@contextmanager
def quiet():
    """Only errors are logged in this block."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


class OnceOfFiles(logging.Filter):
    """Drops what configurations and data sets have already told: several parts of a command open the same file."""

    def __init__(self):
        super().__init__()
        self.told = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(("configs.", "datasets.")):
            return True
        line = record.getMessage()
        known = line in self.told
        self.told.add(line)
        return not known


def setup_logging(level: str, rank: int = 0) -> None:
    """Log to standard error on rank 0; other ranks report errors only."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(OnceOfFiles())
    root = logging.getLogger()
    for old in [h for h in root.handlers if type(h) is logging.StreamHandler]:
        root.removeHandler(old)                        # of an earlier call of main() in this process
    root.addHandler(handler)
    root.setLevel(logging.ERROR if rank else level.upper())
    for noisy in ("PIL", "matplotlib", "torch.distributed", "torch._dynamo", "torch._inductor"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
