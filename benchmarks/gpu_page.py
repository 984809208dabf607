"""docs/gpu.md from what ``benchmarks.gpu`` found."""

import platform

import torch

from benchmarks.harness import markdown
from utils.cpu import cpu_name, instruction_sets

NO_GPU = """<!-- not a GPU -->
**This page was not made on a GPU.** No GPU could be used: it comes from `--device cpu{small}`, which shows that every
part runs, and nothing about speed. No statement about CUDA in this project has been measured.
"""
HEAD = """# On a GPU

`make gpu` writes this page and `benchmarks/gpu.jsonl`, one line for each figure: the tests that need a GPU, then
training, sampling and FID features, each against the plain reference procedure (`benchmarks/reference.py`; FID:
pytorch-fid) in the same run.
"""


def page(args, titles: dict, outcomes: dict, figures: list[dict], date: str, seconds: float) -> str:
    """The whole page. ``outcomes`` by part, ``titles`` of the parts, ``figures`` as ``Figures.add`` makes them."""
    blocks = [HEAD]
    if args.device == "cpu":
        blocks.append(NO_GPU.format(small=" --small" if args.small else ""))
    blocks += [about(args, date, seconds), parts(titles, outcomes), "## Figures\n", table(figures)]
    if tests := [f for f in figures if f["part"] == "tests" and f["what"] == "tests failed" and f["names"]]:
        blocks.append("Tests that failed:\n\n" + "\n".join(f"- {name}" for name in tests[0]["names"]) + "\n")
    blocks.append(limits(figures))
    if args.device == "cuda":
        blocks.append(below(figures))
    return "\n".join(blocks)


def about(args, date: str, seconds: float) -> str:
    lines = {"date": date, "seconds of all parts": f"{seconds:.0f}",
             "CPU": f"{cpu_name()} ({', '.join(instruction_sets())})", "python": platform.python_version(),
             "torch": torch.__version__}
    if args.device == "cuda":
        free = torch.cuda.get_device_properties(0)
        lines |= {"GPU": f"{free.name}, {free.total_memory / 2**30:.0f} GiB, {free.multi_processor_count} processors",
                  "CUDA": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version())}
    return markdown(["", ""], [[key, value] for key, value in lines.items()]) + "\n"


def parts(titles: dict, outcomes: dict) -> str:
    rows = [[name, titles[name], outcome.state, outcome.note.replace("|", "/")[:160], f"{outcome.seconds:.0f}"]
            for name, outcome in outcomes.items()]
    return markdown(["part", "", "state", "why", "seconds"], rows) + "\n"


def table(figures: list[dict]) -> str:
    if not figures:
        return "None.\n"
    if figures[0]["device"] == "cpu":                # ratios would be taken for what they are not
        return markdown(["figure", "on a CPU"], [[figure["what"], shown(figure)] for figure in figures]) + "\n"
    rows = []
    for figure in figures:
        ratio, target = figure["ratio"], figure["target"]
        wanted = "" if target is None else f"{'at most' if figure['at_most'] else 'at least'} {target:g}"
        met = "" if figure["met"] is None else "yes" if figure["met"] else "**no**"
        rows.append([figure["what"], shown(figure),
                     "" if ratio is None else f"{figure['reference']:,.4g}", "" if ratio is None else f"{ratio:.2f}",
                     wanted, met])
    return markdown(["figure", "here", "reference", "ratio", "target", "met"], rows) + "\n"


def shown(figure: dict) -> str:
    return f"{figure['value']:,.4g} {figure['unit']}".strip()


def limits(figures: list[dict]) -> str:
    """Where the time of a step goes, from the trace."""
    traced = next((figure for figure in figures if figure.get("top")), None)
    if traced is None:
        return ""
    whole = sum(seconds for _, seconds in traced["top"])
    rows = [[f"`{name[:90]}`", f"{seconds / whole:.1%}"] for name, seconds in traced["top"]]
    return ("## What limits\n\nThe longest " + ("kernels" if traced["device"] == "cuda" else "operators") +
            " of three training steps (K = 2, bf16), of the time of these:\n\n" + markdown(["", "share"], rows) + "\n")


def below(figures: list[dict]) -> str:
    """What misses its target, and by how much."""
    missed = [figure for figure in figures if figure["met"] is False]
    if not missed:
        return "## Below target\n\nNothing that was measured.\n"
    lines = [f"- {figure['what']}: {figure['value'] if figure['ratio'] is None else figure['ratio']:.3g}, target "
             f"{figure['target']:g}" for figure in missed]
    return "## Below target\n\n" + "\n".join(lines) + "\n"
