"""Bad input: one line on standard error, the right exit code, no code of strangers run, nothing changed on disk."""

import shlex
import subprocess
import sys
from importlib import import_module

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.schema import dotted_keys
from tests.conftest import REPOSITORY
from tests.faults import bad_inputs, jobs
from utils.errors import UserError

AS_PROCESSES = ["malicious checkpoint to resume", "image bomb, converted"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("bad")
    return tmp, bad_inputs.make_files(tmp)


def lasting(files: dict) -> dict:
    """Without lock files, since deleting one is a race, and without packs of data that are good."""
    return {name: content for name, content in files.items() if not name.endswith(".lock") and ".packed" not in name}


@pytest.mark.parametrize(("what", "command", "code", "message"), bad_inputs.CASES, ids=[c[0] for c in bad_inputs.CASES])
def test_one_line_the_code_and_nothing_changed(folder, capfd, what, command, code, message):
    tmp, mark = folder
    script, argv = bad_inputs.argv(command, tmp)
    before = lasting(jobs.files(tmp))
    if what in AS_PROCESSES:
        job = jobs.Job(script, argv)
        got, error = job.wait(), job.text
    elif what == "--exp is a file":                  # one as a user types it
        done = subprocess.run([sys.executable, f"{script}.py", *argv], cwd=REPOSITORY, capture_output=True, text=True,
                              timeout=jobs.PATIENCE)
        got, error = done.returncode, done.stderr
    else:
        got, error = import_module(script).main(argv), capfd.readouterr().err
    assert got == code, error
    assert error.startswith(f"{script}.py: ") and error.count("\n") == 1, error
    assert message in error
    assert lasting(jobs.files(tmp)) == before and not mark.exists()


def test_the_documentation_shows_this_list():
    assert bad_inputs.table() in (REPOSITORY / "docs" / "reliability.md").read_text()
    assert len(bad_inputs.CASES) >= 30


# ------------------------------------------------------------------------------------------------------- hypothesis

SCRIPTS = {"train_ddp": "configure", "generate": "check", "fid": "check", "dataset_tool": None, "diagnose": "check",
           "study": "check"}
COMMANDS = {"fid": ["ref", "calc", "compare"], "dataset_tool": ["convert", "verify", "info"],
            "diagnose": ["eps-norm", "exposure", "gap", "spectrum", "snr", "gamma", "energy", "fit-eps-scaler", "nll",
                         "all"]}
FLAGS = ["--config", "--doc", "--exp", "--num_consecutive_steps", "--lamda", "--input_perturbation", "--seed", "--amp",
    "--compile", "--max_steps", "--resume_training", "--overwrite", "--init_from", "--device",
    "--num_process_per_node", "--node_rank", "--ckpt_id", "--weights", "-i", "--seeds", "--num_samples", "--save",
    "--timesteps", "--eta", "--sample_type", "--skip_type", "--eps_scaler", "--churn", "--batch_size", "--fid_stats",
    "--metrics", "--images", "--out", "--ref", "--num", "--source", "--dest", "--resolution", "--transform",
    "--start_t", "--num_images", "--no-fid", "--study", "--name", "--only", "--dry_run", "--report_only", "--comment"]
VALUES = ["", "0", "1", "-1", "2", "1e400", "nan", "5-1", "1,1", "a", "..", "../x", "/nowhere/x", "digits.yml",
          "digits", "ddim50", "8x8", "png", "heun", "quad", "[", "{", "!!python/object:os.system", "\n", "\x00", "é",
          "off", "null", "cifar10_tiny", "/dev/zero"]


def words():
    keys = [f"--{key}" for key in dotted_keys()]
    value = st.one_of(st.sampled_from(VALUES), st.text(max_size=6))
    pair = st.tuples(st.sampled_from([*FLAGS, *keys]), value).map(list)
    return st.lists(st.one_of(pair, pair, value.map(lambda text: [text])), max_size=6).map(lambda parts: sum(parts, []))


@pytest.mark.parametrize("script", SCRIPTS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_arguments_never_end_in_a_traceback(tmp_path_factory, capsys, script, data):
    """Parsing and checking either works or raises what ``guarded`` turns into one line."""
    from runners.cli import guarded

    command = [data.draw(st.sampled_from(COMMANDS[script]))] if script in COMMANDS else []
    exp = tmp_path_factory.getbasetemp() / "nothing"
    argv = [*command, *data.draw(words()), "--exp", str(exp)]
    module = import_module(script)

    def job():
        args = module.parse(argv)
        if SCRIPTS[script]:
            getattr(module, SCRIPTS[script])(args)

    code = guarded(f"{script}.py", job)
    error = capsys.readouterr().err
    assert (code == 0 and not error) or (code in (2, 3) and error.count("\n") == 1), (shlex.join(argv), code, error)
    assert not exp.exists()


def test_an_error_of_several_lines_is_told_in_one(capsys):
    from runners.cli import guarded

    def job():
        raise UserError("one\ntwo")

    assert guarded("x.py", job) == 2 and capsys.readouterr().err == "x.py: one two\n"
