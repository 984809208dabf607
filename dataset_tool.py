"""Bring images into the on-disk formats, check a data set, or describe a source.

    python dataset_tool.py convert --source photos/ --dest exp/datasets/photos64.zip --resolution 64x64 \\
        --transform center-crop
    python dataset_tool.py verify --config cifar10.yml --full
    python dataset_tool.py info --source exp/datasets/photos64.zip
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from runners.cli import Parser, add_common, guarded, natural, setup_logging
from utils.errors import UserError
from utils.interrupts import ended_by_signals

# As in the tables of datasets/, whose modules take numpy to import.
FORMATS = ("folder", "lmdb", "npy", "zip")
LABEL_RULES = ("auto", "filenames", "folders", "none")
RESAMPLE = ("bilinear", "box", "lanczos")
TRANSFORMS = ("none", "center-crop", "center-crop-wide", "celeba")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 a wrong request, 3 bad data, 130 or 143 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].startswith("--") and argv[0] != "--help":                        # EDM's call has no subcommand
        argv.insert(0, "convert")

    def job():
        args = parse(argv)
        from datasets import tool  # imports numpy and the like, which --help and a wrong flag need not await

        setup_logging(args.verbose)
        with ended_by_signals(__file__):
            getattr(tool, args.command)(args)

    return guarded(__file__, job)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="dataset_tool.py", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="convert | verify | info")

    command = commands.add_parser("convert", help="write any readable source as zip, folder, LMDB or npy")
    command.add_argument("--source", required=True, type=Path,
                         help="folder, zip, npz, npy, LMDB, cifar-10-python.tar.gz")
    command.add_argument("--dest", required=True, type=Path, help="what to make; must not exist yet")
    command.add_argument("--resolution", type=resolution, metavar="WxH", help="size of the result")
    command.add_argument("--transform", default="none", choices=TRANSFORMS, help="cut before resizing; "
                         "center-crop-wide puts black bars above and below")
    command.add_argument("--resample", "--resize-filter", default="lanczos", choices=RESAMPLE)
    command.add_argument("--format", choices=FORMATS, help="default: what the name of --dest says")
    command.add_argument("--max-images", "--max_images", type=int, metavar="N", help="take the first N only")
    command.add_argument("--labels", default="auto", choices=LABEL_RULES, help="classes: of dataset.json, else of the "
                         "top-level folders if there are two or more (auto); folders; filenames (the text before the "
                         "first _); none")
    command.add_argument("--skip_bad", type=natural, default=0, metavar="N", help="leave out and list up to N images "
                                                                                  "that cannot be read")
    command.add_argument("--jpeg", type=int, metavar="QUALITY", help="store JPEG instead of lossless PNG")
    command.add_argument("--workers", type=natural, default=os.cpu_count(), help="processes; 0: this one")

    command = commands.add_parser("verify", help="check the data set of a configuration")
    command.add_argument("--full", action="store_true", help="decode every image, not only the first and the last")
    add_common(command, processes=False)

    command = commands.add_parser("info", help="describe a source")
    command.add_argument("--source", required=True, type=Path)

    for name in ("convert", "info"):
        add_common(commands.choices[name], config=False, processes=False)
    args = parser.parse(argv)
    if args.overrides and args.command != "verify":
        key = args.overrides[0].partition("=")[0]
        raise UserError(f"--{key} is a key of a configuration, which {args.command} has none of; see --help")
    return args


def resolution(text: str) -> tuple[int, int]:
    """``WxH`` -> (height, width)."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or 0 in map(int, match.groups()):
        raise argparse.ArgumentTypeError(f"must be WxH in pixels, e.g. 64x64, given {text}")
    return int(match[2]), int(match[1])


if __name__ == "__main__":
    sys.exit(main())
