"""What the pages say about this repository's files is so."""

import re

import pytest

from tests.conftest import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
FOLDERS = "benchmarks|configs|datasets|docs|functions|models|pytorch_fid|runners|tests|utils"


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
