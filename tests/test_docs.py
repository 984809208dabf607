"""What the pages say about this repository's files is so."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from configs.schema import dotted_keys
from tests.conftest import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
FOLDERS = "benchmarks|configs|datasets|docs|functions|models|pytorch_fid|runners|tests|utils"
SCRIPTS = "train_ddp|generate|fid|dataset_tool|diagnose|study"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_cites_is_there(page):
    missing = [f"{file}::{name}" for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", page.read_text())
               if not re.search(rf"^def {name}\(", (REPOSITORY / file).read_text(), re.MULTILINE)]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_cites_is_there(page):
    text = page.read_text()
    cited = re.findall(rf"`((?:{FOLDERS})/[\w./-]+\.(?:py|md|yml|npz|npy|pt|safetensors))\b", text)
    linked = [target.partition("#")[0] for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)]
    found = [(name, REPOSITORY / name) for name in cited] + [(name, page.parent / name) for name in linked if name]
    found += [(name, REPOSITORY / f"{name.replace('.', '/')}.py")
              for name in re.findall(r"python -m ((?:benchmarks|tests)\.\w+)", text)]
    bare = {path.name for path in (REPOSITORY / "tests").rglob("test_*.py")}
    assert not [name for name, path in found if not path.exists()]
    assert not {name for name in re.findall(r"`(test_\w+\.py)`", text)} - bare


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_leads_out_of_the_repository(page):
    assert "../shared" not in page.read_text()


def commands(text: str) -> list[list[str]]:
    """Words of the lines of code blocks that start one of the scripts, by Python or a launcher."""
    blocks = [block for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if kind in ("", "sh")]
    start = rf"(?:python|torchrun|accelerate|mpirun|srun)\b.*?((?:{SCRIPTS})\.py .*)"
    return [shlex.split(found[1], comments=True) for line in "".join(blocks).replace("\\\n", " ").splitlines()
            if (found := re.match(start, line))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_has_known_flags_and_keys(page):
    for script, *words in commands(page.read_text()):
        args = import_module(script.removesuffix(".py")).parse([word for word in words if word != "..."])
        keys = {override.partition("=")[0] for override in getattr(args, "overrides", [])}
        assert keys <= dotted_keys().keys(), (script, words)
        for flag in ("config", "study"):
            name = getattr(args, flag, None) or "MINE"
            shipped = any((REPOSITORY / "configs").rglob(Path(name).name))
            assert shipped or name.startswith(("my", "exp/")) or name.isupper(), (script, words)
