"""The benchmarks of speed and memory one after the other, and their tables into docs/performance.md: ``make bench``.

    python -m benchmarks                                    # CPU, 20 to 50 minutes on two cores that do nothing else
    python -m benchmarks --device cuda                      # the same on a GPU, with its batch sizes; not data
    python -m benchmarks --only train startup               # the others' tables stay

Each kind of CPU (by its instruction sets: avx2, avx512f, avx512_bf16, amx_bf16) and CUDA have tables of their own;
those of another kind stay, and the first table of a kind of CPU goes below those of others. The text outside the
markers of docs/performance.md is written by hand.
Left out are ``benchmarks.precision``, which needs real images, ``benchmarks.soak``, which measures no speed, and on a
CPU the growth with the number of images, ``benchmarks.sample --parts growth``, a quarter of an hour by itself.
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
from utils.cpu import cpu_kind, instruction_sets

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/performance.md"
SCRIPTS = {                                                # arguments on a CPU, and on a GPU; None: a CPU's job
    "train": ("", "--device cuda --batch 128 --rounds 20 --pictures 2048"),
    "sample": ("--parts speed memory", "--device cuda --batch 256 --steps 50"),
    "families": ("--rounds 3 --batch 4", "--device cuda --batch 128 --rounds 20 --steps 25"),
    "startup": ("", "--device cuda"),
    "scaling": ("--parts training sampling processes", "--device cuda --parts training sampling"),
    "fid": ("--num 64 --rounds 3 --images {images}", "--device cuda --num 2000 --images {images}"),
    "data": ("--num 1000 --source {images}", None),
}


def arguments(name: str, device: str) -> str | None:
    return SCRIPTS[name][device == "cuda"]


def run(name: str, device: str, images: Path) -> str:
    """The output of a script, which also appears as it comes."""
    words = arguments(name, device).format(images=images).split()
    command = [sys.executable, "-m", f"benchmarks.{name}", *words]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait():
        raise SystemExit(f"benchmarks.{name} failed")
    return "".join(lines).strip()


def kind_of(device: str) -> str:
    """Whose tables a run fills."""
    return "cuda" if device == "cuda" else cpu_kind(instruction_sets())


def section(marker: str) -> re.Pattern:
    return re.compile(rf"(<!-- {marker} -->\n).*?(<!-- end {marker} -->)", re.DOTALL)


def check_markers(page: str, names: list[str]) -> None:
    """Before the measuring: each script must have a place, of some kind of device."""
    if absent := [name for name in names if f"<!-- end {name} " not in page]:
        raise SystemExit(f"{PAGE} lacks tables of {', '.join(absent)}: <!-- NAME KIND --> ... <!-- end NAME KIND -->")


def put(page: str, name: str, kind: str, text: str) -> str:
    """The page with ``text`` in the place of this script and kind, which is made below those of other CPUs."""
    marker = f"{name} {kind}"
    if not section(marker).search(page):
        last = [*re.finditer(rf"<!-- end {name} (?!cuda)\S+ -->\n", page)][-1].end()       # a GPU's lie further below
        page = f"{page[:last]}\n<!-- {marker} -->\n<!-- end {marker} -->\n{page[last:]}"
    return section(marker).sub(lambda match: f"{match[1]}{text}\n{match[2]}", page)


def head(name: str, device: str, seconds: float) -> str:
    """What was run, when, on what."""
    about, flag = machine(), "" if device == "cpu" else f" --device {device}"
    where = about["gpu"] if device == "cuda" else f"{about['cpu']} ({', '.join(about['instructions'])})"
    return (f"`python -m benchmarks --only {name}{flag}`, {about['time'][:10]}, {where}, {about['cores']} cores, "
            f"torch {about['torch']}, {seconds:.0f} s:")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="+", choices=list(SCRIPTS), help="default: all that the device has a part in")
    parser.add_argument("--images", type=Path, help="zip of images for fid and data; default: made here")
    args = parser.parse_args()
    names = args.only or [name for name in SCRIPTS if arguments(name, args.device) is not None]
    if foreign := [name for name in names if arguments(name, args.device) is None]:
        parser.error(f"--only {' '.join(foreign)}: a CPU's job, run it without --device {args.device}")
    check_markers(PAGE.read_text(), names)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        images = args.images or zipped(Path(temporary))
        for name in names:
            start = time.perf_counter()
            text = run(name, args.device, images)
            text = f"{head(name, args.device, time.perf_counter() - start)}\n\n{text}"
            write_text(PAGE, put(PAGE.read_text(), name, kind_of(args.device), text))
    print(f"all of it: {time.perf_counter() - began:.0f} s")


def zipped(folder: Path) -> Path:
    write_pictures(folder / "pictures/all", 2000, 32)              # torchvision wants a folder for each class
    return Path(shutil.make_archive(str(folder / "pictures"), "zip", folder / "pictures"))


if __name__ == "__main__":
    main()
