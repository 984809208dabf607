"""The life of a script: what it returns, and how a rank of several ends."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch

from runners import cli, distributed
from runners.sampling.flags import add_sampler_flags
from tests.conftest import REPOSITORY
from utils.errors import Interrupted, UserError
from utils.interrupts import Terminated, terminable

ARGS = Namespace(verbose="critical", node_rank=0, num_proc_node=1, num_process_per_node=1, device="cpu",
                 master_address=None, master_port=None, dist_timeout=1, max_restarts=0)


def stop(args, device):
    raise Interrupted(15, "stopped")


@pytest.mark.parametrize(("work", "code"), [(lambda args, device: None, 0), (lambda args, device: 4, 4), (stop, 143)])
@pytest.mark.parametrize("size", [1, 2])
def test_a_rank_of_several_leaves_with_the_code_of_its_work(monkeypatch, size, work, code):
    left = []
    monkeypatch.setattr(distributed, "detect", lambda: distributed.World(size=size))
    monkeypatch.setattr(distributed, "process_group", lambda *args: nullcontext())
    monkeypatch.setattr(distributed, "leave", left.append)
    monkeypatch.setattr(cli, "setup_logging", lambda *args: None)
    assert cli.run_script("job.py", [], lambda argv: ARGS, lambda args: None, work) == code
    assert left == ([code] if size > 1 else [])                   # alone, Python ends by itself


@pytest.mark.parametrize(("name", "value"), [("dcw", "-0.05,0.01"), ("dcw", "-1e-05"), ("eps_scaler", "-0.0005,1.01")])
def test_a_list_may_begin_with_a_negative_number(name, value):
    """The hint of diagnose.py fit-eps-scaler has one where K falls with the noise."""
    parser = cli.Parser()
    add_sampler_flags(parser, "100")
    for words in ([f"--{name}", value], [f"--{name}={value}"]):
        assert getattr(parser.parse(words), name) == value


def test_a_flag_after_a_flag_is_still_a_missing_value():
    parser = cli.Parser()
    add_sampler_flags(parser, "100")
    with pytest.raises(UserError, match="--dcw: expected one argument"):
        parser.parse(["--dcw", "--eta", "1"])


@pytest.mark.parametrize(("words", "message"), [
    (["--batch_size", "64"], "did you mean --training.batch_size or --sampling.batch_size?"),
    (["--dropout", "0"], "did you mean --model.dropout?"), (["--lr=1"], "did you mean --optim.lr?"),
    (["digits.yml"], "did you mean --config digits.yml?"),
    (["--nothing_like_it", "1"], "see --help"),
])
def test_keys_and_files_without_their_flag_are_pointed_out(words, message):
    parser = cli.Parser()
    cli.add_common(parser)
    with pytest.raises(UserError, match=re.escape(message)):
        parser.parse(words)


def test_out_of_memory_on_a_gpu_is_one_line(monkeypatch, capsys):
    def work(request, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(cli, "setup_logging", lambda *args: None)
    assert cli.run_script("job.py", [], lambda argv: ARGS, lambda args: None, work) == 2
    told = capsys.readouterr().err
    assert told.startswith("job.py: CUDA out of memory; train with a smaller") and told.count("\n") == 1


@pytest.mark.parametrize(("script", "arguments"), [
    ("train_ddp", "--config digits.yml"), ("generate", "--config digits.yml"), ("diagnose", "all --config digits.yml"),
    ("fid", "calc --images x --ref y"), ("dataset_tool", "info --source x"), ("study", "--study digits.yml")])
def test_a_python_without_packages_helps_and_names_one(script, arguments):
    command = [sys.executable, "-S", f"{script}.py"]
    assert subprocess.run([*command, "--help"], cwd=REPOSITORY, capture_output=True).returncode == 0
    done = subprocess.run([*command, *arguments.split()], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.match(rf"{script}.py: the package (torch|numpy) is not installed for .*; `make install` ", done.stderr)


def test_a_missing_package_is_one_line_and_a_missing_module_of_ours_a_bug(capsys):
    def lacks(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    assert cli.guarded("job.py", lambda: lacks("torch.nn")) == 2
    told = capsys.readouterr().err
    assert told.startswith("job.py: the package torch.nn is not installed") and told.count("\n") == 1
    with pytest.raises(ModuleNotFoundError):
        cli.guarded("job.py", lambda: lacks("runners.nothing"))


def test_what_files_tell_is_logged_once_in_a_command(capsys):
    for _ in range(2):
        cli.setup_logging("info")
        for name in ("configs.reading", "configs.reading", "runners.diffusion", "runners.diffusion"):
            logging.getLogger(name).info("from %s", name)
    told = capsys.readouterr().err
    assert told.count("from configs.reading") == 2 and told.count("from runners.diffusion") == 4


def test_help_tells_every_default_also_zero(capsys):
    parser = cli.Parser(prog="job.py")
    parser.add_argument("--eta", type=float, default=0.0, help="noise")
    parser.add_argument("--steps", type=int, default=None, help="how many")
    parser.add_argument("--force", action="store_true", help="in any case")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (default: the clock)")
    with pytest.raises(SystemExit):
        parser.parse(["--help"])
    told = capsys.readouterr().out
    assert "noise (default: 0.0)" in told and told.count("default") == 2


def test_sigterm_is_heard_once_and_only_meanwhile():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), terminable():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL       # a second one ends what cleans up
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_script_may_be_called_in_a_thread():
    told = []

    def script():
        with terminable():
            told.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=script)
    thread.start()
    thread.join()
    assert told == [signal.getsignal(signal.SIGTERM)]
