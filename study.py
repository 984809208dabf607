"""Train a grid of runs alike, measure them with many samplers, and report; a stopped study goes on when run again."""

import sys
from contextlib import ExitStack

from runners.cli import Parser, add_common, run_script
from utils.errors import UserError


def parse(argv):
    parser = Parser(prog="study.py", description=__doc__)
    parser.add_argument("--study", required=True, metavar="NAME.yml", help="file, or a name in configs/studies/; any "
                        "key of the configuration that its runs share can be overridden: --data.root FILE")
    parser.add_argument("--name", help="of the folders EXP/studies/NAME and EXP/logs/NAME (default: the file's)")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="work on these runs; other processes or machines that "
                                                                 "share EXP can work on others at the same time")
    parser.add_argument("--report_only", action="store_true", help="write the report of what is measured so far")
    parser.add_argument("--dry_run", action="store_true", help="print runs and cells with their network calls; write "
                                                               "nothing")
    parser.add_argument("--inception_weights", metavar="FILE", help="weights of the feature network")
    add_common(parser, config=False)
    args = parser.parse(argv)
    if args.dry_run and args.report_only:
        raise UserError("--dry_run and --report_only exclude each other")
    if args.report_only and (args.only or args.inception_weights):
        raise UserError("--report_only reports on all that is measured; leave out --only and --inception_weights")
    return args


def check(args):
    from runners.study.job import StudyJob
    from utils.writable import check_writable

    job = StudyJob(args.study, args.exp, args.name, args.overrides, args.only)
    check_writable(job.folder / "study.yml", "the study's")
    return args, job


def work(request, device):
    from runners.distributed import on_rank_zero
    from runners.study.report import describe_plan, write_report
    from runners.study.runner import StudyRunner
    from utils.locks import lock_folder

    args, job = request
    if args.dry_run:
        return on_rank_zero(lambda: print(describe_plan(job)))
    if not args.report_only:
        with ExitStack() as held:
            for run, seed in job.runs:
                on_rank_zero(lambda doc=f"{run}-{seed}": held.enter_context(lock_folder(job.run(doc).path)))
            StudyRunner(job, device, inception_weights=args.inception_weights).work()
    on_rank_zero(lambda: print("\n".join(map(str, write_report(job)))))


def main(argv=None) -> int:
    return run_script(__file__, argv, parse, check, work)


if __name__ == "__main__":
    sys.exit(main())
