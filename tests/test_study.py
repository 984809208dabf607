"""study.py: the grid is trained and measured once, a stopped study goes on, what would mix results is refused."""

import json
import re
import signal
from functools import partial

import numpy as np
import pytest
import torch
import yaml

import runners.study.runner
import study
from configs.schema import load_config, save_config
from functions.schedule import make_schedule
from functions.timesteps import sampling_times
from runners.diffusion import Diffusion
from runners.evaluation import references
from runners.study.grid import read_cells
from runners.study.runner import StudyRunner
from tests.faults import jobs

TINY = {
    "config": "digits.yml",
    "overrides": {"model.ch": 32, "model.ch_mult": [1], "model.num_res_blocks": 1, "model.attn_resolutions": [],
                  "data.image_size": 8, "training.global_batch_size": 8, "training.log_freq": 1,
                  "sampling.batch_size": 8},
    "runs": {"base": {"loss.lamda": 0}, "SA+IP": {"loss.lamda": 1.0, "loss.input_perturbation": 0.1}},
    "images_seen": [8, 24],
    "num_images": 12, "interval": True, "reference_images": 40, "fit_images": 4, "grid": 4,
    "samplers": [{"timesteps": [2, 3]}, {"timesteps": [2], "images_seen": [8], "runs": ["base"]},
                 {"timesteps": [2], "eps_scaler": "fit", "runs": ["base"]},
                 {"timesteps": [2], "sample_type": "ddpm_noisy", "runs": ["base"]}],
}
CELLS = 7


class TinyNet:
    """A fixed random projection of the pixels in the place of Inception."""

    dim, device, preprocess, fingerprint, source = 16, torch.device("cpu"), "pytorch-fid", "tiny", "a test"
    images = 0

    def __init__(self, *args):
        self.weight = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) / 8

    def __call__(self, images):
        TinyNet.images += len(images)
        return (images.float() / 255).flatten(1) @ self.weight


@pytest.fixture
def start(tmp_path, monkeypatch):
    """``start(*flags, key=value)`` runs study.py in an empty folder with TINY and these keys."""
    monkeypatch.setattr("runners.study.runner.load_inception", TinyNet)
    monkeypatch.setattr(references, "DIM", 16)
    monkeypatch.setattr(TinyNet, "images", 0)

    def run(*flags, **changes):
        (tmp_path / "tiny.yml").write_text(yaml.safe_dump({**TINY, **changes}))
        return study.main(["--study", str(tmp_path / "tiny.yml"), "--exp", str(tmp_path / "exp"), "--device", "cpu",
                           "--verbose", "critical", *flags])

    run.folder, run.logs = tmp_path / "exp" / "studies" / "tiny", tmp_path / "exp" / "logs" / "tiny"
    return run


def fids(start):
    return {key: entry["fid"] for key, entry in read_cells(start.folder / "cells").items()}


def test_a_grid_is_measured_once_and_reported_whole(start, capsys):
    assert start("--dry_run") == 0
    assert f"{CELLS} of {CELLS} cells to measure" in capsys.readouterr().out and not start.folder.exists()
    assert start() == 0
    first, seen = fids(start), TinyNet.images
    assert len(first) == CELLS and seen == 40 + 12 * CELLS
    assert sorted(p.name for p in (start.logs / "base-1024").glob("model_*")) == ["model_1_ema.pth", "model_3_ema.pth"]

    page, text = ((start.folder / f"report.{kind}").read_text() for kind in ("html", "md"))
    for value in first.values():
        assert f"{value:.2f}" in page and f"{value:.2f}" in text
    assert text.count("![") == len(list(start.folder.glob("*/*.png"))) - 1           # earlier weights: no gallery
    assert page.count("data:image/png;base64,") == text.count("![") and "src=\"f" not in page
    assert page.count('class="scroll"') == page.count("<table>") == 5

    assert start() == 0                                                              # nothing is done again
    assert TinyNet.images == seen and fids(start) == first
    file = start.folder / "cells" / "SA+IP-1024.jsonl"
    *lines, last = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines) + last[:40])                                      # as a power cut leaves it
    assert start("--only", "SA+IP") == 0
    assert TinyNet.images == seen + 12 and fids(start) == first                      # one cell again: the same number
    assert f"{CELLS} of {CELLS} cells" in (start.folder / "report.md").read_text()   # also of the runs left out
    added = [*TINY["samplers"], {"timesteps": [4], "runs": ["base"]}]
    assert start(samplers=added) == 0
    assert TinyNet.images == seen + 24 and first.items() < fids(start).items()


def tiny_metrics() -> None:
    runners.study.runner.load_inception, references.DIM = TinyNet, 16


def test_a_cell_without_what_the_report_is_about(start, capsys):
    small = {"runs": {"base": {"loss.lamda": 0}}, "samplers": [{"timesteps": [2]}], "images_seen": [8]}
    assert start(**small) == 0
    file = start.folder / "cells" / "base-1024.jsonl"
    file.write_text(file.read_text().replace('"fid":', '"fie":'))
    capsys.readouterr()
    assert start("--report_only", **small) == 3
    assert "holds a line without fid, the study's first metric" in capsys.readouterr().err


def test_a_plan_counts_every_network_call_of_training(start, capsys):
    """24 images: one call each, two with K = 2; before each of them two of scheduled sampling."""
    steps = {"loss.scheduled_sampling": {"steps": 2}}
    runs = {"one": {"loss.lamda": 0}, "two": {"loss.lamda": 1}, "three": {"loss.lamda": 0, **steps},
            "four": {"loss.lamda": 1, **steps}}
    assert start("--dry_run", runs=runs, samplers=TINY["samplers"][:1]) == 0
    told = capsys.readouterr().out
    for run, calls in (("one", 24), ("two", 48), ("three", 72), ("four", 144)):
        assert re.search(rf"{run}-1024 +3 steps, {calls} images through the network", told), told


def test_two_ranks_find_what_one_finds(start, tmp_path):
    small = {"runs": {"SA+IP": TINY["runs"]["SA+IP"]}, "samplers": [{"timesteps": [2]}], "interval": False,
             "overrides": {**TINY["overrides"], "training.micro_batch_size": 4}}
    assert start("--name", "alone", **small) == 0
    argv = ["--study", str(tmp_path / "tiny.yml"), "--exp", str(tmp_path / "exp"), "--device", "cpu"]
    ranks = jobs.ranks("study", argv, faults={0: [tiny_metrics], 1: [tiny_metrics]})
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.text for rank in ranks]
    alone = read_cells(start.folder.with_name("alone") / "cells")
    assert fids(start) == pytest.approx({key: entry["fid"] for key, entry in alone.items()}, rel=1e-4)


def make_it_slowly(folder) -> None:
    """In a job: the reference is being made until another has come for it, too."""
    tiny_metrics()
    make = runners.study.runner.make_reference

    def make_reference(*args, **keywords):
        (folder / "making").touch()
        jobs.wait_until((folder / "coming").exists)
        make(*args, **keywords)

    runners.study.runner.make_reference = make_reference


def come_for_it(folder) -> None:
    tiny_metrics()
    hold = runners.study.runner.exclusive

    def exclusive(*args):
        (folder / "coming").touch()
        return hold(*args)

    runners.study.runner.exclusive, runners.study.runner.make_reference = exclusive, None


def test_jobs_that_share_a_study_make_its_reference_once(start, tmp_path):
    start("--dry_run", samplers=[{"timesteps": [2]}])                                 # writes its file
    argv = ["--study", str(tmp_path / "tiny.yml"), "--exp", str(tmp_path / "exp"), "--device", "cpu", "--only"]
    first = jobs.Job("study", [*argv, "base"], [partial(make_it_slowly, tmp_path)])
    jobs.wait_until((tmp_path / "making").exists)
    second = jobs.Job("study", [*argv, "SA+IP"], [partial(come_for_it, tmp_path)])
    assert (first.wait(), second.wait()) == (0, 0), first.text + second.text
    assert len(fids(start)) == 2


@pytest.mark.parametrize(("target", "name", "moment"), [
    (Diffusion, "open_training_images", 1),                     # before the first step
    (Diffusion, "train_step", 2),
    (TinyNet, "__call__", 3),                                   # the second batch of the first cell
])
def test_a_stopped_study_goes_on(start, monkeypatch, capsys, target, name, moment):
    small = {"runs": {"base": {"loss.lamda": 0}}, "samplers": [{"timesteps": [2, 3]}], "interval": False}
    assert start("--name", "whole", **small) == 0
    original, calls = getattr(target, name), 0

    def stopping(*args):
        nonlocal calls
        calls += 1
        if calls == moment:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(target, name, stopping)
    assert start(**small) == 143
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(target, name, original)
    assert start(**small) == 0
    whole = read_cells(start.folder.with_name("whole") / "cells")
    assert fids(start) == {key: entry["fid"] for key, entry in whole.items()}


@pytest.mark.parametrize(("changes", "message"), [
    ({"seedz": [1]}, "did you mean seeds"),
    ({"samplers": [{"timesteps": [2], "etaa": 0}]}, "samplers[0].etaa: unknown key; did you mean samplers[0].eta"),
    ({"samplers": [{"timesteps": [1001]}]}, "1 to 1000"),
    ({"samplers": [{"timesteps": [2], "images_seen": [16]}]}, "samplers[0].images_seen names [16]"),
    ({"samplers": [{"timesteps": [2], "sample_type": "magic"}]}, "ddpm_noisy"),
    ({"runs": {"a/b": {}}}, "letters, digits"),
    ({"runs": {"a": {"loss.lamdaa": 1}}}, "run a of the study: "),
    ({"runs": {"a": {"loss.lamdaa": 1}}}, "did you mean loss.lamda"),
    ({"runs": {"a": {}, "b": {"training.global_batch_size": 4}}}, "global_batch_size"),
    ({"images_seen": [24, 8]}, "must ascend"),
    ({"images_seen": [12]}, "not a multiple of the global batch of 8"),
    ({"metrics": ["pr", "fid"]}, "must begin with what the report is about"),
    ({"fid_stats": "nowhere.npz"}, "fid.py ref"),
    ({"runs": {"a": {"training.seed": 1}}}, "training.seed is set by the study"),
    ({"overrides": {"training.sample_num": 4}}, "training.sample_num is set by the study"),
])
def test_a_wrong_study_gets_one_line_and_exit_2(start, capsys, changes, message):
    assert start(**{"samplers": TINY["samplers"][:1], **changes}) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not start.folder.exists() and not start.logs.exists()


@pytest.mark.parametrize("key, seeds", [("apart", ["36-47", "60-71"]), ("shared", ["0-11", "0-11"])])
def test_every_training_seed_has_images_of_its_own(start, monkeypatch, key, seeds):
    made = []
    measure = runners.study.runner.generate_and_measure

    def noting(sampler, seeds, *args, **kwargs):
        made.append(f"{min(seeds)}-{max(seeds)}")
        return measure(sampler, seeds, *args, **kwargs)

    monkeypatch.setattr(runners.study.runner, "generate_and_measure", noting)
    assert start(runs={"base": {"loss.lamda": 0}}, samplers=[{"timesteps": [2]}], images_seen=[8], seeds=[3, 5],
                 image_seeds=key) == 0
    assert made == seeds == [entry["seeds"] for entry in read_cells(start.folder / "cells").values()]


def test_a_configuration_with_retention_is_fine_for_a_study(start, tmp_path):
    """Whose runs keep what is measured, and nothing else."""
    save_config(load_config("digits.yml", ["training.keep_last=3", "training.keep_every=10"]), tmp_path / "kept.yml")
    assert start("--dry_run", config=str(tmp_path / "kept.yml")) == 0


def test_an_older_study_goes_on_with_the_images_it_has(start, capsys):
    """Its file says nothing of their seeds; its cells do."""
    small = {"runs": {"base": {"loss.lamda": 0}}, "samplers": [{"timesteps": [2]}], "images_seen": [8]}
    assert start(**small, image_seeds="shared") == 0
    file, _ = start.folder / "study.yml", capsys.readouterr()
    file.write_text(file.read_text().replace("image_seeds: shared\n", ""))
    assert start(**small) == 2
    error = capsys.readouterr().err
    assert "have the seeds 0-11, not 12288-12299; image_seeds: shared goes on" in error and error.count("\n") == 1


def test_what_would_mix_results_is_refused(start, capsys):
    small = {"runs": {"base": {"loss.lamda": 0}}, "samplers": [{"timesteps": [2]}], "images_seen": [8]}
    assert start("--report_only", **small) == 2 and "no measured cell" in capsys.readouterr().err
    assert start(**small) == 0
    before, _ = (start.folder / "study.yml").read_text(), capsys.readouterr()
    for change, message in (({"num_images": 20}, "num_images was 12, is 20"),
                            ({"image_seeds": "shared"}, "image_seeds was 'apart', is 'shared'"),
                            ({"runs": {"base": {"loss.lamda": 0.5}}}, "loss.lamda is 0"),
                            ({"overrides": {**TINY["overrides"], "optim.lr": 0.1}}, "optim.lr")):
        assert start(**{**small, **change}) == 2
        error = capsys.readouterr().err
        assert message in error and "--name" in error and error.count("\n") == 1
    assert (start.folder / "study.yml").read_text() == before
    assert start("--report_only", "--only", "base", **small) == 2 and "leave out --only" in capsys.readouterr().err
    assert start("--only", "SA", **small) == 2 and "runs: base" in capsys.readouterr().err
    assert start("--data.image_sizes", "4", **small) == 2 and "data.image_size" in capsys.readouterr().err


def test_another_reference_is_refused(start, capsys):
    small = {"runs": {"base": {"loss.lamda": 0}}, "samplers": [{"timesteps": [2]}], "images_seen": [8]}
    assert start(**small) == 0
    before, file = fids(start), start.folder / "reference.npz"
    with np.load(file) as stored:
        content = dict(stored)
    np.savez(file, **{**content, "mu": content["mu"] + 1})
    capsys.readouterr()
    assert start(**{**small, "samplers": [{"timesteps": [2, 3]}]}) == 2
    error = capsys.readouterr().err
    assert "measured against another reference" in error and error.count("\n") == 1
    assert fids(start) == before


def test_more_images_to_fit_than_there_are(start, capsys):
    assert start(fit_images=1798) == 2
    assert "fit_images 1798 are more than the 1797 training images" in capsys.readouterr().err
    assert not list(start.logs.glob("*/*"))


def test_a_path_that_yaml_takes_for_a_date(start, capsys):
    overrides = {**TINY["overrides"], "data.dataset": "FOLDER"}
    assert start("--data.root", "2020-01-01", overrides=overrides) == 3
    error = capsys.readouterr().err
    assert "2020-01-01" in error and error.count("\n") == 1


def test_weights_that_vanish_are_not_measured_as_others(start, monkeypatch, capsys):
    make_reference = StudyRunner._make_reference
    monkeypatch.setattr(StudyRunner, "_make_reference", lambda self, done: (
        make_reference(self, done), (start.logs / "base-1024").rename(start.logs / "moved")))
    assert start(runs={"base": {"loss.lamda": 0}}, samplers=[{"timesteps": [2]}], images_seen=[192]) == 2
    assert "the weights after 192 images are gone" in capsys.readouterr().err and not fids(start)


def test_a_run_that_has_passed_a_place_cannot_be_measured_there(start, capsys):
    small = {"runs": {"base": {"loss.lamda": 0}}, "samplers": [{"timesteps": [2]}], "images_seen": [16]}
    assert start(**small) == 0
    assert start(**{**small, "images_seen": [8, 16]}) == 2 and "at the end only" in capsys.readouterr().err
    assert start(**{**small, "images_seen": [16, 24]}) == 0
    assert start(**{**small, "images_seen": [16, 10**6]}) == 2 and "more training.n_epochs" in capsys.readouterr().err


def test_remedies_are_keys_of_a_sampler_and_of_a_run(start):
    """Gamma is measured for each network at the sampler's own times; an epsilon scaling can be fitted beside it."""
    samplers = [{"timesteps": [3], "dcw": [0.05, 0.01], "time_shift": "100,200"},
                {"timesteps": [3], "restart": [[3, 2, 0.3, 2.0]]},
                {"timesteps": [3], "var_type": "analytic", "gamma": "measure", "eps_scaler": "fit", "skip_type": "edm",
                 "sigma_min": 0.1, "sigma_max": 20, "rho": 3}]
    runs = {"base": {"loss.lamda": 0}, "SS": {"loss.scheduled_sampling": {"steps": 1, "ramp": 0.0}}}
    assert start(samplers=samplers, runs=runs, images_seen=[8]) == 0
    cells = list(read_cells(start.folder / "cells").values())
    assert len(cells) == 6 and len({cell["fid"] for cell in cells if cell["study"]["run"] == "base"}) == 3
    assert sorted(cell["network_calls"] for cell in cells) == [3, 3, 3, 3, 7, 7]
    analytic = [cell for cell in cells if cell["sampler"]["var_type"] == "analytic"]
    assert len({cell["sampler"]["gamma"] for cell in analytic}) == 2 and all(cell["fit"]["b"] for cell in analytic)
    advised_against = sum(cell["fit"]["no_correction"] for cell in analytic)
    assert (start.folder / "report.md").read_text().count(" (no correction)") == advised_against > 0
    times = [json.loads(path.read_text())["times"] for path in (start.folder / "gamma").glob("*.json")]
    schedule = make_schedule(load_config("digits.yml").diffusion)
    assert times == [sampling_times(schedule, 3, "edm", sigma_min=0.1, sigma_max=20, rho=3)] * 2
    assert start(samplers=samplers, runs=runs, images_seen=[8]) == 0                             # nothing is left to do
