"""What can be written to, as a user without special rights sees it."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.faults import jobs
from utils.errors import UserError
from utils.writable import check_appendable, check_writable

NOBODY = 65534


@pytest.fixture
def folder():
    """Where another user may look, which tmp_path is not."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


def report(checks: list) -> int:
    """Prints what each (check, path) says to a user without special rights."""
    if os.getuid() == 0:
        os.setuid(NOBODY)
    for check, path in checks:
        try:
            check(path, "--out")
            print("fine")
        except UserError as error:
            print(error)
    return 0


def test_what_may_be_written(folder):
    closed, log, own = folder / "closed", folder / "closed/log.txt", folder / "closed/own.txt"
    closed.mkdir()
    for file, mode in ((log, 0o666), (own, 0o644)):
        file.write_text("a line")
        file.chmod(mode)
    closed.chmod(0o555)
    if os.getuid():
        own.chmod(0o444)
    (folder / "dangling").symlink_to(folder / "nowhere")
    cases = [
        (check_writable, folder / "new", "fine"),
        (check_writable, folder / "new/deeper/file", "fine"),
        (check_writable, closed / "new", f"no file can be made in {closed} (Permission denied); name another place"),
        (check_writable, closed / "new/deeper", f"no file can be made in {closed} (Permission denied)"),
        (check_writable, log, f"no file can be made in {closed} (Permission denied)"),
        (check_writable, log / "below", f"no file can be made in {log} (Not a directory)"),
        (check_writable, folder / "dangling/file", f"no file can be made in {folder / 'dangling'} (No such file"),
        (check_writable, Path("/"), "no file can be made in / (Permission denied)"),
        (check_appendable, log, "fine"),
        (check_appendable, own, "may not be written to; name another file"),
        (check_appendable, closed / "new", f"no file can be made in {closed} (Permission denied)"),
        (check_appendable, folder / "new", "fine"),
    ]
    job = jobs.Job(report, [[(check, path) for check, path, _ in cases]])
    assert job.wait() == 0, job.text
    said = job.text.splitlines()
    assert len(said) == len(cases)
    for line, (_, path, message) in zip(said, cases, strict=True):
        assert line == "fine" if message == "fine" else line.startswith(f"--out {path}") and message in line
    closed.chmod(0o777)
    assert sorted(file.name for file in folder.rglob("*")) == ["closed", "dangling", "log.txt", "own.txt"]
