"""diagnose.py nll: likelihoods of a network with learned variances, on any number of processes."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

import diagnose
from tests.faults import jobs
from tests.runners.adm_runs import flags
from utils.errors import UserError


def nll(adm_exp, adm_file, *more):
    return diagnose.main(["nll", *flags(adm_file, adm_exp, "--doc", "small", "--num_images", 7, "--batch_size", 3,
                                        *more)])


def results(adm_exp):
    path, = (adm_exp / "diagnose" / "small").glob("nll-*.csv")
    return path, list(csv.DictReader(path.open())), json.loads(path.with_suffix(".json").read_text())


@pytest.fixture
def own(adm_exp, tmp_path):
    shutil.copytree(adm_exp / "logs", tmp_path / "logs")
    return tmp_path


def test_likelihood_is_over_all_steps_with_learned_variances(own, adm_file, capsys):
    assert nll(own, adm_file, "--npz") == 0
    path, rows, note = results(own)
    run = note["runs"]["small"]
    assert [row["t"] for row in rows] == [str(t) for t in range(8)] and "learned-8-steps" in path.name
    total = sum(float(row["bits"]) for row in rows) + run["prior_bits"]
    assert run["bits_per_dim"] == pytest.approx(total) and run["num_images"] == 7 and run["standard_error"] > 0
    assert f"{run['bits_per_dim']:.4f} bits/dim" in capsys.readouterr().out
    stored = np.load(path.with_name(f"{path.stem}-small") / "vb_terms.npz")["arr_0"]
    assert stored.tolist() == pytest.approx([float(row["bits"]) for row in rows[::-1]])
    assert not list(path.parent.glob("*.parts"))


def test_runs_of_the_same_last_name_have_files_of_their_own(own, adm_file):
    for name in ("a", "b"):
        shutil.copytree(own / "logs" / "small", own / "logs" / name / "small")
    assert nll(own, adm_file, "--npz", "--timesteps", "2", "--doc", "a/small", "b/small") == 0
    folders = sorted(path.parent.name for path in (own / "diagnose").rglob("vb_terms.npz"))
    assert [name[-8:] for name in folders] == ["-a-small", "-b-small"]


def test_likelihood_does_not_depend_on_processes(own, adm_file):
    assert nll(own, adm_file) == 0
    _, rows, note = results(own)
    shutil.rmtree(own / "diagnose")
    argv = ["nll", *flags(adm_file, own, "--doc", "small", "--num_images", 7, "--batch_size", 3)]
    assert [job.wait() for job in jobs.ranks("diagnose", argv)] == [0, 0]
    _, again, other = results(own)
    assert [float(row["bits"]) for row in again] == pytest.approx([float(row["bits"]) for row in rows], rel=1e-4)
    assert other["runs"]["small"]["bits_per_dim"] == pytest.approx(note["runs"]["small"]["bits_per_dim"], rel=1e-5)


def test_an_interrupted_likelihood_goes_on(own, adm_file, monkeypatch):
    from runners.diagnosis import likelihood

    measure, done = likelihood.measure, []

    def fails_at_the_second(diagnosis, x0, places):
        done.append(places[0])
        if len(done) == 2:
            raise UserError("enough")
        return measure(diagnosis, x0, places)

    monkeypatch.setattr(likelihood, "measure", fails_at_the_second)
    assert nll(own, adm_file) == 2 and done == [0, 3]
    assert nll(own, adm_file) == 0 and done == [0, 3, 3, 6]
    interrupted = results(own)[1]
    shutil.rmtree(own / "diagnose")
    assert nll(own, adm_file) == 0 and results(own)[1] == interrupted


def test_likelihood_of_a_published_file(adm_exp, adm_file, tmp_path):
    state = torch.load(adm_exp / "logs" / "small" / "ckpt.pth", weights_only=True)["ema"]
    torch.save(state, tmp_path / "ADM.pt")
    assert nll(tmp_path, adm_file, "--weights", tmp_path / "ADM.pt", "--timesteps", "4") == 0
    assert results(tmp_path)[2]["runs"]["small"]["format"] == "adm"


@pytest.mark.parametrize(("more", "message"), [
    (["--eps_scaler", "1.01"], "no --eps_scaler"), (["--dcw", "0.1"], "--dcw or --time_shift"),
    (["--var_type", "analytic"], "no analytic variance"), (["--sample_type", "generalized"], "no other --sample_type"),
    (["--data.uniform_dequantization", "true", "--model.learn_sigma", "false", "--loss.variational", "none"],
     "it needs data.rescaled, no dequantization"),
    (["--weights", "absent.pt"], "--weights absent.pt: no such file")])
def test_likelihood_refusals(more, message, adm_exp, adm_file, tmp_path, caplog, capsys):
    folder = adm_exp if "--weights" not in more and "--data.uniform_dequantization" not in more else tmp_path
    if folder is tmp_path:
        (tmp_path / "logs" / "small").mkdir(parents=True)
        shutil.copy(adm_exp / "logs" / "small" / "ckpt.pth", tmp_path / "logs" / "small")
    assert nll(folder, adm_file, *more) == 2
    assert message in capsys.readouterr().err + caplog.text
