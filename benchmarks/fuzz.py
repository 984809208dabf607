"""Damage every kind of file that the program reads, and every script's arguments, and see that each case ends in order.

    python -m benchmarks.fuzz --minutes 10                  # every kind in turn
    python -m benchmarks.fuzz --only pickles --cases 100000
    python -m benchmarks.fuzz --only lmdb --seed 3 --case 118          # one case again, with its traceback

A case is a sound set of files of one kind, one of them damaged from (kind, seed, number), and what the program does
with them. In order is: it works, or it raises what a script turns into one line. A finding is anything else: another
exception, a signal, more than 2 GiB, more than 20 s (longer where others use the machine), or a file changed outside
the folder of the case. The exit code is 1 if there is any; the folder of each is kept.
"""

import argparse
import contextlib
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fuzz_kinds import KINDS, pickle_seeds
from benchmarks.mutations import mutate, mutate_files
from utils.errors import UserError

__all__ = ["main", "mutate", "pickle_seeds"]
SECONDS, MEMORY = 20, 2 << 30
BATCH = 200                 # cases of one process


@dataclass(frozen=True)
class Finding:
    kind: str
    seed: int
    case: int
    what: str               # one line
    detail: str = ""        # a traceback

    def __str__(self):
        return f"{self.kind}: {self.what}  (--only {self.kind} --seed {self.seed} --case {self.case})"


class TooSlow(BaseException):
    """Not an Exception, so that no reader takes it for a broken file."""


def patience() -> float:
    """Seconds of a case, in proportion to how many processes share a core."""
    return SECONDS * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def run_case(kind: str, seed: int, case: int, folder: Path) -> Finding | None:
    """Damage the files of ``kind`` below ``folder`` and let the program read them."""
    rng = random.Random(f"{kind}-{seed}-{case}")
    make, read = KINDS[kind]
    mutate_files(make(fresh(folder), rng), folder, rng)
    before, start, limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic(), patience()
    outcome = _outcome(read, folder, rng, limit)
    if outcome is None and time.monotonic() - start > limit:
        outcome = f"took {time.monotonic() - start:.0f} s", ""
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    if outcome is None and grown > MEMORY:
        outcome = f"took {grown / 2**30:.1f} GiB", ""
    return Finding(kind, seed, case, *outcome) if outcome else None


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _outcome(read, folder: Path, rng: random.Random, limit: float) -> tuple[str, str] | None:
    def too_slow(*_):
        raise TooSlow

    signal.signal(signal.SIGALRM, too_slow)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        read(folder, rng)
    except (UserError, SystemExit) as error:
        if len(str(error).splitlines()) > 1:
            return f"an error of several lines: {str(error)!r}", ""
    except OSError as error:                              # ``guarded`` prints those of the system as one line
        if error.errno is None or isinstance(error, ConnectionError):
            return f"{type(error).__name__}: {error}", traceback.format_exc()
    except TooSlow:
        return f"more than {limit:.0f} s", traceback.format_exc()
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]!r}", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


# ---------------------------------------------------------------------------------------------------------- processes

def _work(pipe, kind: str, seed: int, cases: range, folder: Path, stop: float) -> None:
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    outside = _snapshot(folder.parent / "outside")
    for case in cases:
        if time.monotonic() > stop:
            break
        pipe.send(("started", case))
        found = run_case(kind, seed, case, folder)
        if not found and _snapshot(folder.parent / "outside") != outside:
            found = Finding(kind, seed, case, "changed a file outside its folder")
        pipe.send(("ended", found))
    pipe.send(("done", None))


def _snapshot(folder: Path) -> list:
    return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*"))


def run_cases(kind: str, seed: int, cases: range, scratch: Path, stop: float) -> tuple[int, list[Finding]]:
    """How many of ``cases`` were tried, and the findings; a process that dies is one, and the next goes on."""
    findings, next_case, last = [], cases.start, None
    while next_case < cases.stop and time.monotonic() < stop:
        ours, theirs = multiprocessing.Pipe()
        worker = multiprocessing.get_context("fork").Process(
            target=_work, args=(theirs, kind, seed, range(next_case, cases.stop), scratch / "case", stop))
        worker.start()
        theirs.close()
        state = "started"
        while state != "done":
            try:
                if not ours.poll(1.5 * patience() + 10):
                    raise EOFError
                state, value = ours.recv()
            except (EOFError, OSError):
                break
            if state == "started":
                last, next_case = value, value + 1
            elif state == "ended" and value:
                findings.append(value)
                _keep(value, scratch)
        if state != "done":
            alive = worker.exitcode is None and not _joined(worker)
            worker.kill()
            worker.join()
            code = worker.exitcode
            what = "does not end" if alive else f"died of signal {-code}" if code < 0 else f"ended with code {code}"
            findings.append(Finding(kind, seed, last, what))
            _keep(findings[-1], scratch)
        else:
            worker.join()
            break
    return next_case - cases.start, findings


def _joined(worker) -> bool:
    worker.join(1)
    return worker.exitcode is not None


def _keep(finding: Finding, scratch: Path) -> None:
    target = scratch / "findings" / f"{finding.kind}-{finding.seed}-{finding.case}"
    with contextlib.suppress(OSError, shutil.Error):
        shutil.copytree(scratch / "case", target, symlinks=True, dirs_exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    (target / "finding.txt").write_text(f"{finding}\n{finding.detail}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, help="share this time among the kinds (default 10, unless --cases)")
    parser.add_argument("--cases", type=int, help="so many of each kind instead")
    parser.add_argument("--only", nargs="+", choices=sorted(KINDS), help="these kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one, in this process")
    args = parser.parse_args(argv)
    kinds = args.only or list(KINDS)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None          # many small files: no disk need see them
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory))
    (scratch / "outside").mkdir()
    (scratch / "outside/precious").write_text("kept")
    if args.case is not None:
        found = run_case(kinds[0], args.seed, args.case, scratch / "case")
        print(f"{found}\n{found.detail}" if found else "in order", f"\nfiles: {scratch / 'case'}")
        return bool(found)
    tried, findings = Counter(), []
    end = time.monotonic() + 60 * (args.minutes or (1e6 if args.cases else 10))
    import torch  # once for all processes, as are the sound files of a kind

    torch.set_num_threads(1)
    for number, kind in enumerate(kinds):
        KINDS[kind][0](fresh(scratch / "case"), random.Random(0))
        stop = time.monotonic() + (end - time.monotonic()) / (len(kinds) - number)
        while time.monotonic() < stop and tried[kind] < (args.cases or sys.maxsize):
            batch = min(BATCH * (10 if kind == "pickles" else 1), (args.cases or sys.maxsize) - tried[kind])
            count, found = run_cases(kind, args.seed, range(tried[kind], tried[kind] + batch), scratch, stop)
            tried[kind] += count
            findings += found
        print(f"{kind:12} {tried[kind]:9,} mutations, {sum(f.kind == kind for f in findings)} findings", flush=True)
    print(f"{'all':12} {sum(tried.values()):9,} mutations, {len(findings)} findings")
    for line in dict.fromkeys(map(str, findings[:40])):
        print(line)
    if findings:
        print(f"kept in {scratch / 'findings'}")
    else:
        shutil.rmtree(scratch)
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
