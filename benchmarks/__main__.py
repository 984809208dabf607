"""All benchmarks one after the other, and their tables into docs/performance.md: ``make bench``.

    python -m benchmarks                                    # CPU, some 20 minutes on two cores that do nothing else
    python -m benchmarks --device cuda                      # the same on a GPU, with its batch sizes
    python -m benchmarks --only train startup               # the others' tables stay

The text outside the markers of docs/performance.md is written by hand.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import machine
from benchmarks.workload import write_pictures
from utils.atomic import write_text

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/performance.md"
SCRIPTS = {                                                # arguments on a CPU, and on a GPU
    "train": ("", "--device cuda --batch 128 --rounds 20 --pictures 2048"),
    "sample": ("", "--device cuda --batch 256 --steps 50 --images 1000 10000 50000"),
    "startup": ("", "--device cuda"),
    "scaling": ("--parts training sampling processes", "--device cuda --parts training sampling"),
    "fid": ("--num 32 --images {images}", None),           # None: a CPU's job in both cases
    "data": ("--num 1000 --source {images}", None),
}


def run(name: str, device: str, images: Path) -> str:
    """The output of a script, which also appears as it comes."""
    on_cpu, on_cuda = SCRIPTS[name]
    words = (on_cuda if device == "cuda" and on_cuda is not None else on_cpu).format(images=images).split()
    command = [sys.executable, "-m", f"benchmarks.{name}", *words]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait():
        raise SystemExit(f"benchmarks.{name} failed")
    return "".join(lines).strip()


def put(name: str, text: str) -> None:
    """Replace what stands between the page's markers of ``name``."""
    page = PAGE.read_text()
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
    if not re.search(pattern, page, re.DOTALL):
        raise SystemExit(f"{PAGE} has no markers <!-- {name} --> and <!-- end {name} -->")
    write_text(PAGE, re.sub(pattern, lambda match: f"{match[1]}{text}\n{match[2]}", page, flags=re.DOTALL))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS))
    parser.add_argument("--images", type=Path, help="zip of images for fid and data; default: made here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        images = args.images or zipped(Path(temporary))
        for name in args.only:
            start = time.perf_counter()
            text = run(name, args.device, images)
            about = machine()
            head = (f"`python -m benchmarks --only {name}`, {about['time'][:10]}, {about['gpu'] or about['cpu']}, "
                    f"{about['cores']} cores, torch {about['torch']}, {time.perf_counter() - start:.0f} s:")
            put(name, f"{head}\n\n{text}")


def zipped(folder: Path) -> Path:
    write_pictures(folder / "pictures", 2000, 32)
    return Path(shutil.make_archive(str(folder / "pictures"), "zip", folder / "pictures"))


if __name__ == "__main__":
    main()
