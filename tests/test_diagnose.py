"""diagnose.py: tables, figures and the fit for one run and several, on any number of processes; refusals."""

import csv
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import diagnose
import generate
from tests.faults import jobs
from utils.errors import DataError, UserError

FLAGS = ["--device", "cpu", "--timesteps", "4", "--num_images", "12", "--batch_size", "5", "--verbose", "critical"]


@pytest.fixture(autouse=True)
def _one_thread():
    """The network is so small that threads mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(exp, measure, *flags, docs=("digits",)):
    return diagnose.main([measure, "--exp", str(exp), "--doc", *docs, *FLAGS, *flags])


def run_on_two_ranks(exp, measure, *flags):
    ranks = jobs.ranks("diagnose", [measure, "--exp", str(exp), "--doc", "digits", *FLAGS, *flags])
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.text for rank in ranks]


def table(exp, measure, doc="digits", panels=2):
    path, = (exp / "diagnose" / doc).glob(f"{measure}-*.csv")
    assert Image.open(path.with_suffix(".png")).size == (900 * panels, 630)
    note = json.loads(path.with_suffix(".json").read_text())
    assert note["measure"] == measure and note["num_images"] == 12
    return list(csv.DictReader(path.open())), note


def numbers(rows):
    return [float(value) for row in rows for key, value in row.items() if key not in ("run", "start")]


def test_eps_norms_of_two_runs_on_one_figure(exp, capsys):
    shutil.copytree(exp / "logs" / "digits", exp / "logs" / "other" / "run")
    assert run(exp, "eps-norm", docs=("digits", "other/run")) == 0
    rows, note = table(exp, "eps-norm", "digits+other-run")
    assert [(row["run"], row["t"]) for row in rows] == [(name, str(t)) for name in ("digits", "other/run")
                                                        for t in (0, 250, 500, 750)]
    assert [r["sampling"] for r in rows[:4]] == [r["sampling"] for r in rows[4:]]          # the same weights
    for row in rows:
        assert float(row["ratio"]) == pytest.approx(float(row["sampling"]) / float(row["training"]))
    assert note["runs"]["digits"]["fingerprint"] and "eps-norm-DDIM-4-steps-ckpt.png" in capsys.readouterr().out


@pytest.mark.parametrize(("keys", "flags", "correctors"), [
    ({}, (), ["0", "250", "500"]), ({}, ("--restart", "3,2,0.5,2"), ["0", "250", "500"]),
    ({"prediction": "v_prediction", "zero_terminal_snr": True}, ("--skip_type", "trailing"), ["249", "499"])],
    ids=["plain", "restart", "from noise alone"])
def test_eps_norms_of_heun(exp, keys, flags, correctors):
    """Each evaluation stands at its own time; the last step has no corrector, nor has the first from noise alone."""
    file = exp / "logs/digits/config.yml"
    config = yaml.safe_load(file.read_text())
    config["diffusion"] |= keys
    file.write_text(yaml.safe_dump(config))
    assert run(exp, "eps-norm", "--sample_type", "heun", *flags) == 0
    rows, _ = table(exp, "eps-norm")
    first, second = ([row["t"] for row in rows if row["evaluation"] == kind] for kind in ("first", "corrector"))
    assert len(first) == 4 and second == correctors


@pytest.mark.parametrize("sampler", [("generalized", "--eta", "0.5"), ("ddpm_noisy",), ("heun",)])
def test_exposure_from_noise_and_from_the_middle(exp, sampler):
    assert run(exp, "exposure", "--sample_type", *sampler, "--start_t", "520") == 0
    rows, note = table(exp, "exposure")
    assert note["starts"] == [None, 500]
    assert [(r["start"], r["s"]) for r in rows] == [("noise", s) for s in ("750", "500", "250", "0", "-1")] + [
        ("500", s) for s in ("250", "0", "-1")]
    for row in rows:
        assert float(row["delta"]) == pytest.approx(float(row["var_chain"]) - float(row["var_q"]))


def test_chains_of_other_times_do_not_go_into_one_table(exp, capsys):
    short = exp / "logs" / "short"
    shutil.copytree(exp / "logs" / "digits", short)
    config = (short / "config.yml").read_text()
    (short / "config.yml").write_text(config.replace("num_diffusion_timesteps: 1000", "num_diffusion_timesteps: 200"))
    assert run(exp, "exposure", docs=("digits", "short")) == 2
    assert "these runs have chains of other times" in capsys.readouterr().err
    assert run(exp, "eps-norm", docs=("digits", "short")) == 0


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_moved_start_is_told_once(exp, capfd, processes):
    assert run(exp, "exposure", "--start_t", "520", "--num_process_per_node", processes) == 0
    assert capfd.readouterr().out.count("--start_t 520: the nearest times of the chain are taken, 500") == 1


def test_gap(exp):
    assert run(exp, "gap") == 0
    rows, _ = table(exp, "gap")
    assert [(r["t"], r["next_t"]) for r in rows] == [("750", "500"), ("500", "250"), ("250", "0"), ("0", "-1")]
    assert all(float(row[key]) > 0 for row in rows for key in ("gap", "noise_floor", "accumulated_gap"))


def test_two_processes_measure_the_same(exp):
    assert run(exp, "exposure", "--sample_type", "ddpm_noisy") == 0
    one, _ = table(exp, "exposure")
    run_on_two_ranks(exp, "exposure", "--sample_type", "ddpm_noisy")
    assert numbers(table(exp, "exposure")[0]) == pytest.approx(numbers(one), rel=1e-4, abs=1e-5)


def test_a_fit_that_is_no_correction_comes_without_a_command(exp, capsys):
    assert run(exp, "fit-eps-scaler", "--model", "linear") == 0
    out = capsys.readouterr().out
    assert "no correction of exposure bias" in out and "generate.py" not in out


def test_the_fitted_scaling_comes_with_a_command_that_uses_it(exp, capsys, monkeypatch):
    from runners.diagnosis.measures import Diagnosis

    monkeypatch.setattr(Diagnosis, "is_no_correction", lambda self, fit: False)
    assert run(exp, "fit-eps-scaler", "--model", "linear") == 0
    rows, note = table(exp, "fit-eps-scaler")
    assert {(row["scaled"], row["t"]) for row in rows} == {(s, t) for s in "01" for t in ("0", "250", "500", "750")}
    fit, out = note["runs"]["digits"]["fit"], capsys.readouterr().out
    command = next(line for line in out.splitlines() if line.startswith("python generate.py"))
    words = shlex.split(command)
    k, b = map(float, words[words.index("--eps_scaler") + 1].split(","))
    assert (k, b) == (pytest.approx(fit["k"], rel=1e-3), pytest.approx(fit["b"], rel=1e-4))
    assert generate.main([*words[2:], "--no-fid", "--num_samples", "2", "--device", "cpu"]) == 0
    assert (exp / "image_samples" / "digits" / "000001.png").exists()


def test_a_printed_command_keeps_what_was_overridden(exp):
    root = f"data.root={exp / 'my data'}"
    job = diagnose.Job(diagnose.parse(["gap", "--exp", str(exp), "--doc", "digits", *FLAGS, f"--{root}"]))
    args = generate.parse(shlex.split(job.command("digits", eps_scaler="-0.001,1.02"))[2:])
    assert args.overrides == [root] and args.eps_scaler == "-0.001,1.02"


def test_chains_are_those_of_generate(exp):
    """The chain of seed 3 has the norms that a callback on ``Diffusion.sample`` sees."""
    from configs.sampling import SamplerSettings
    from datasets.packed import open_images
    from functions.exposure import eps_norm
    from runners.diagnosis.measures import Diagnosis
    from runners.diffusion import Diffusion

    diffusion, seen = Diffusion.from_run(exp / "logs" / "digits", device="cpu"), []
    settings = SamplerSettings(timesteps=4, eta=1.0)
    list(diffusion.sample([3, 4], settings, callback=lambda i, t, x, x0, eps: seen.append(eps_norm(eps).mean())))
    diagnosis = Diagnosis(diffusion, open_images(diffusion.config, exp / "datasets"), settings, num_images=2, seed=3)
    found = torch.from_numpy(diagnosis.sampling_norms()["first"].mean)
    torch.testing.assert_close(found, torch.stack(seen[::-1]).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("settings", [{}, {"ode_time": "ve"}, {"dcw": (0.1, "pixel")}])
def test_what_is_measured_at_the_end_is_the_sample(exp, monkeypatch, settings):
    """Not the last estimate, which is another where the last step does not end in it."""
    from configs.sampling import SamplerSettings
    from datasets.packed import open_images
    from functions.spectrum import radial_power
    from runners.diagnosis.measures import Diagnosis
    from runners.diagnosis.trajectories import Trajectories
    from runners.diffusion import Diffusion

    diffusion = Diffusion.from_run(exp / "logs" / "digits", device="cpu")
    settings = SamplerSettings(timesteps=4, sample_type="heun", **settings)
    diagnosis = Diagnosis(diffusion, open_images(diffusion.config, exp / "datasets"), settings, num_images=3)
    *_, bias = diagnosis.exposure([None])
    power = [row["sampling"] for row in Trajectories(diagnosis).spectra() if row["quantity"] == "image"]
    decode, seen = diffusion.codec.decode, []
    monkeypatch.setattr(diffusion.codec, "decode", lambda x: seen.append(x) or decode(x))
    list(diffusion.sample([0, 1, 2], settings))
    sample, = seen
    assert bias["s"] == -1 and bias["var_chain"] == pytest.approx(sample.double().var(0).mean().item(), rel=1e-5)
    assert power == pytest.approx(radial_power(sample).mean(0).tolist(), rel=1e-5)


@pytest.mark.parametrize(("measure", "flags", "message"), [
    ("eps-norm", ["--doc", "absent"], "config.yml does not exist"),
    ("eps-norm", ["--doc", "digits", "digits"], "names a run twice"),
    ("eps-norm", ["--doc", "../digits"], "without '..'"),
    ("eps-norm", ["--sample_type", "heum"], "dpmpp_2m, euler, generalized, heun"),
    ("eps-norm", ["--timesteps", "1001"], "1 to 1000"),
    ("eps-norm", ["--eta", "2"], "--eta 2.0: input should be less than or equal to 1"),
    ("eps-norm", ["--eps_scaler", "-1"], "greater than 0"),
    ("eps-norm", ["--ckpt_id", "77"], "no checkpoint 77"),
    ("eps-norm", ["--num_images", "5000"], "2 to 1797"),
    ("eps-norm", ["--model.ch", "64"], "contradicts"),
    ("exposure", ["--start_t", "a"], "is not a list"),
    ("exposure", ["--start_t", "900"], "times 0 to 750"),
    ("fit-eps-scaler", ["--eps_scaler", "1.1"], "do not give one"),
    ("gamma", ["--guidance", "2"], "no --guidance"),
    ("eps-norm", ["--sample_type", "diffusers:HeunDiscreteScheduler"], "needs one network call for each step"),
    ("fit-eps-scaler", ["--fid_check", "10", "--fid_stats", "absent.npz"], "not found"),
    ("fit-eps-scaler", ["--fid_stats", "absent.npz"], "are for --fid_check; add it"),
])
def test_refusals_are_one_line_and_write_nothing(exp, capsys, measure, flags, message):
    assert run(exp, measure, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (exp / "diagnose").exists()


def test_results_that_cannot_be_kept_are_refused_before_the_work(exp, capsys):
    (exp / "diagnose").write_text("in the way")
    assert run(exp, "eps-norm") == 2
    assert f"no file can be made in {exp / 'diagnose'} (Not a directory)" in capsys.readouterr().err


def test_missing_data_exit_with_3(exp, capsys):
    config = exp / "logs" / "digits" / "config.yml"
    config.write_text(config.read_text().replace("dataset: DIGITS", "dataset: CELEBA"))
    assert run(exp, "gap") == 3
    assert "CELEBA not found" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- sizes along the chain


def test_gamma_is_what_eps_norms_are_made_of_and_generate_takes_its_file(exp, capsys):
    assert run(exp, "gamma") == 0
    rows, note = table(exp, "gamma")
    assert [row["t"] for row in rows] == ["0", "250", "500", "750"]
    out = capsys.readouterr().out
    command = next(line for line in out.splitlines() if "generate.py" in line).partition("python ")[2]
    file = json.loads(Path(note["runs"]["digits"]["gamma"]).read_text())
    assert file["gamma"] == [float(row["training"]) for row in rows] and file["pixels"] == 2
    assert file["weights"] == note["runs"]["digits"]["fingerprint"] and file["num_images"] == 12
    words = shlex.split(command)[1:]
    assert generate.main([*words, "--no-fid", "--num_samples", "2", "--device", "cpu"]) == 0
    manifest = json.loads((exp / "image_samples" / "digits" / "manifest.json").read_text())
    assert manifest["sampler"]["var_type"] == "analytic" and len(manifest["sampler"]["gamma"]) == 16
    assert generate.main([*words, "--no-fid", "--num_samples", "2", "--device", "cpu", "--timesteps", "1000",
                          "-i", "other"]) == 2
    assert "measured at times 0 to 750" in capsys.readouterr().err
    assert generate.main([*words, "--no-fid", "--num_samples", "2", "--device", "cpu", "-i", "other",
                          "--no-model_ema"]) == 2
    assert "was measured on other weights" in capsys.readouterr().err


@pytest.mark.parametrize("change", [
    {"times": ["a", 1]}, {"times": [10**400, 1]}, {"times": {"a": 1}}, {"gamma": [[], 1]}, {"pixels": "2"},
    {"gamma": 3}, {"format": []}])
def test_an_odd_file_of_gamma_is_one_line(tmp_path, change):
    from runners.sampling.gamma import read_gamma

    sound = {"format": "gamma 1", "times": [0, 10], "gamma": [0.5, 0.8], "pixels": 2, "weights": "0"}
    (tmp_path / "g.json").write_text(json.dumps(sound))
    assert read_gamma(tmp_path / "g.json").gamma.times == [0, 10]
    (tmp_path / "g.json").write_text(json.dumps(sound | change))
    with pytest.raises(DataError, match="not a file of Gamma"):
        read_gamma(tmp_path / "g.json")
    (tmp_path / "g.json").write_text("[" * 10**5)
    with pytest.raises(DataError, match="not a file of Gamma"):
        read_gamma(tmp_path / "g.json")
    (tmp_path / "endless.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is not a file but a device"):
        read_gamma(tmp_path / "endless.json")


@pytest.mark.parametrize("measure", ["energy", "snr", "spectrum"])
def test_sizes_along_the_chain(exp, measure):
    assert run(exp, measure) == 0
    rows, _ = table(exp, measure, panels=3 if measure == "spectrum" else 2)
    if measure == "spectrum":
        assert {row["band"] for row in rows} == {"ll", "lh", "hl", "hh", *(f"r {n}" for n in range(5))}
        assert len(rows) == 2 * 4 * 4 + 5
    else:
        assert [row["t"] for row in rows] == ["0", "250", "500", "750"]
    key = "shift" if measure == "snr" else "ratio"
    assert all(abs(float(row[key])) < 1e6 for row in rows)


def test_everything_on_one_page_with_a_verdict(exp, capsys):
    assert run(exp, "all") == 0
    out = capsys.readouterr().out
    page, = (exp / "diagnose" / "digits").glob("all-*.html")
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 15 and "src=\"http" not in text
    for word in ("Steps: 2, which is few", "Average: ", "Loss: 2 lines", "Held-out loss: not measured", "Drift: "):
        assert word in text and word in out
    assert {path.name.partition("-DDIM")[0] for path in (exp / "diagnose" / "digits").glob("*.csv")} == {
        "eps-norm", "exposure", "gap", "spectrum", "snr", "gamma", "energy"}


def test_two_processes_measure_the_same_sizes(exp):
    assert run(exp, "energy") == 0
    one, _ = table(exp, "energy")
    run_on_two_ranks(exp, "energy")
    assert numbers(table(exp, "energy")[0]) == pytest.approx(numbers(one), rel=1e-4, abs=1e-5)
