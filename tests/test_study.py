"""study.py: the grid is trained and measured once, a stopped study goes on, what would mix results is refused."""

import json
import os
import re
import signal
from dataclasses import asdict

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

import runners.study.runner
import study
from configs.study import STUDIES, Sampler, Study, load_study, study_yaml
from runners.diffusion import Diffusion
from runners.evaluation import references
from runners.study.grid import Cell, cells_of, prepare_cells, read_cells
from runners.study.job import StudyJob
from runners.study.page import Picture, to_html
from runners.study.pairs import difference
from runners.study.report import write_report
from tests.faults import jobs
from utils.errors import DataError

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


def report_of(start, value, **changes) -> str:
    """Of numbers that are put in, ``value(cell)``."""
    start.folder.parent.mkdir(parents=True)
    study = {**TINY, "seeds": [1, 2, 3], "images_seen": [8, 16], "metrics": ["digits_fd"], **changes}
    (start.folder.parent / "tiny.yml").write_text(yaml.safe_dump(study, sort_keys=False))
    job = StudyJob(start.folder.parent / "tiny.yml", start.folder.parents[1])
    assert job.runs == [(run, seed) for seed in (1, 2, 3) for run in study["runs"]]      # cut short: whole comparisons
    (start.folder / "cells").mkdir(parents=True)
    for cell in job.all_cells:
        with (start.folder / "cells" / f"{cell.doc}.jsonl").open("a") as file:
            file.write(json.dumps({"study": asdict(cell), "digits_fd": value(cell), "network_calls": 2,
                                   "reference_fingerprint": "", "sampling_seconds": 1.0, "seconds": 1.0}) + "\n")
    return write_report(job)[0].read_text()


def test_several_seeds_are_compared_in_pairs(start):
    """SA is 1 better than base with every seed, which differ by 10, and as good with half the images; a remedy while
    sampling hurts base, and what it does to SA is not known."""
    def value(cell):
        found = {1: 11.0, 2: 21.0, 3: 31.0}[cell.seed]
        if cell.images_seen == 16:
            found -= (cell.run == "SA") + 0.01 * cell.seed * (cell.run == "base")
        if "dcw" in cell.settings:
            found += {"base": 5 + 0.1 * cell.seed, "SA": cell.seed - 2}[cell.run]
        return found

    text = report_of(start, value, runs={"base": {"loss.lamda": 0}, "SA": {"loss.lamda": 1.0}}, samplers=[
        {"timesteps": [2]}, {"timesteps": [2], "images_seen": [8]}, {"timesteps": [2], "dcw": 0.1}])
    images, calls, sampling = (text.split(f"## Remedies {part}")[1].split("\n## ")[0] for part in (
        "in training, at equal images", "in training, at equal network calls", "while sampling"))
    assert "| DDIM | 2 | 20.980 ± 5.768 | **20.000 ± 5.774** |" in text                      # the spread of the seeds
    assert "**-0.980 ± 0.006**" in images and "SA: helps with 2 of 2 (DDIM 2, DDIM, DCW 0.1 2)." not in images
    assert "+0.020 ± 0.006" in calls and "**+0.020" not in calls and "SA: not distinguishable with 1 of 1." in calls
    assert "| **+5.200 ± 0.058** | +0.000 ± 0.577 |" in sampling
    assert "hurts with 1 of 2 (base in 2 steps), not distinguishable with 1." in sampling


def test_equal_network_calls_are_counted_against_those_of_the_first_run(start):
    """Which takes two for each image itself: a run with two has no place there, one with four stands at half."""
    runs = {"SA": {"loss.lamda": 1.0}, "SA+IP": {"loss.lamda": 1.0, "loss.input_perturbation": 0.1},
            "SA+SS": {"loss.lamda": 1.0, "loss.scheduled_sampling": {"steps": 1}}}
    text = report_of(start, lambda cell: float(cell.images_seen), runs=runs, samplers=[
        {"timesteps": [2]}, {"timesteps": [2], "images_seen": [8]}])
    calls = text.split("at equal network calls")[1].split("\n## ")[0]
    assert "SA+IP" not in calls and "| sampler | steps | SA+SS |" in calls and "-8.000 ± 0.000" in calls


def test_a_difference_is_told_by_its_interval():
    """t(0.975) of two degrees of freedom is 4.3027: 1, 2, 3 has the mean 2 and the standard error 1/sqrt(3)."""
    found = difference({1: 1.0, 2: 2.0, 3: 3.0, 9: 0.0}, {1: 0.0, 2: 0.0, 3: 0.0})
    assert found == pytest.approx((2, 3 ** -0.5, 4.302653 * 3 ** -0.5), rel=1e-6)
    assert found.verdict == "not distinguishable"                                        # 2 < 2.484
    assert difference({1: 2.0, 2: 2.0, 3: 3.0}, {1: 0.0, 2: 0.0, 3: 0.0}).verdict == "hurts"
    assert difference({1: -5.0}, {1: 0.0}).verdict == "not distinguishable"              # one seed tells nothing
    assert difference({1: 1.0}, {2: 1.0}) is None


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


def test_a_cell_is_what_its_sampler_reads():
    samplers = [Sampler(timesteps=[5]), Sampler(timesteps=[5], eta=0.0),
                Sampler(timesteps=[5], sample_type="ddpm_noisy"),
                Sampler(timesteps=[5], sample_type="ddpm_noisy", var_type="fixedsmall")]
    assert [cell.label for cell in cells_of(Study.model_validate({**TINY, "samplers": samplers, "runs": {"a": {}}}))] \
        == ["DDIM", "ancestral, fixedlarge", "ancestral, fixedsmall"]
    with pytest.raises(ValidationError, match="eta is for generalized, not for ddpm_noisy"):
        Sampler(timesteps=[5], sample_type="ddpm_noisy", eta=0.5)


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


def test_what_would_mix_results_is_refused(start, capsys):
    small = {"runs": {"base": {"loss.lamda": 0}}, "samplers": [{"timesteps": [2]}], "images_seen": [8]}
    assert start("--report_only", **small) == 2 and "no measured cell" in capsys.readouterr().err
    assert start(**small) == 0
    before, _ = (start.folder / "study.yml").read_text(), capsys.readouterr()
    for change, message in (({"num_images": 20}, "num_images was 12, is 20"),
                            ({"runs": {"base": {"loss.lamda": 0.5}}}, "loss.lamda is 0"),
                            ({"overrides": {**TINY["overrides"], "optim.lr": 0.1}}, "optim.lr")):
        assert start(**{**small, **change}) == 2
        error = capsys.readouterr().err
        assert message in error and "--name" in error and error.count("\n") == 1
    assert (start.folder / "study.yml").read_text() == before
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


def test_a_run_that_has_passed_a_place_cannot_be_measured_there(start, capsys):
    small = {"runs": {"base": {"loss.lamda": 0}}, "samplers": [{"timesteps": [2]}], "images_seen": [16]}
    assert start(**small) == 0
    assert start(**{**small, "images_seen": [8, 16]}) == 2 and "at the end only" in capsys.readouterr().err
    assert start(**{**small, "images_seen": [16, 24]}) == 0
    assert start(**{**small, "images_seen": [16, 10**6]}) == 2 and "more training.n_epochs" in capsys.readouterr().err


def test_shipped_studies_load_and_survive_a_round_trip(tmp_path):
    names = [path.stem for path in STUDIES.glob("*.yml")]
    for name in names:
        (tmp_path / "study.yml").write_text(study_yaml(load_study(name)))
        assert load_study(tmp_path / "study.yml") == load_study(name)
    assert {"digits", "digits_search"} <= set(names)


def test_a_pipe_among_the_cells_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "base.jsonl")
    with pytest.raises(DataError, match="is not a file but a pipe"):
        read_cells(tmp_path)


def test_only_broken_lines_are_dropped(tmp_path):
    file = tmp_path / "base-1.jsonl"
    file.write_text(json.dumps({"a": 1}) + "\n" + '{"a": ')
    prepare_cells(file)
    assert file.read_text() == '{"a": 1}\n'


@pytest.mark.parametrize("name", ["base-1.jsonl", "base-1.txt"])
def test_cells_are_not_added_to_what_a_link_leads_to(tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_text("mine\n")
    (tmp_path / name).symlink_to(outside)
    with pytest.raises(DataError, match=f"{name}: is a link"):
        prepare_cells(tmp_path / "base-1.jsonl")
    assert outside.read_text() == "mine\n"


def test_remedies_are_keys_of_a_sampler_and_of_a_run(start):
    """Gamma is measured for each network; an epsilon scaling can be fitted beside it."""
    samplers = [{"timesteps": [3], "dcw": [0.05, 0.01], "time_shift": "100,200"},
                {"timesteps": [3], "restart": [[3, 2, 0.3, 2.0]]},
                {"timesteps": [3], "var_type": "analytic", "gamma": "measure", "eps_scaler": "fit"}]
    runs = {"base": {"loss.lamda": 0}, "SS": {"loss.scheduled_sampling": {"steps": 1, "ramp": 0.0}}}
    assert start(samplers=samplers, runs=runs, images_seen=[8]) == 0
    cells = list(read_cells(start.folder / "cells").values())
    assert len(cells) == 6 and len({cell["fid"] for cell in cells if cell["study"]["run"] == "base"}) == 3
    assert sorted(cell["network_calls"] for cell in cells) == [3, 3, 3, 3, 7, 7]
    analytic = [cell for cell in cells if cell["sampler"]["var_type"] == "analytic"]
    assert len({cell["sampler"]["gamma"] for cell in analytic}) == 2 and all(cell["fit"]["b"] for cell in analytic)
    advised_against = sum(cell["fit"]["no_correction"] for cell in analytic)
    assert (start.folder / "report.md").read_text().count(" (no correction)") == advised_against > 0
    assert len(list((start.folder / "gamma").glob("*.json"))) == 2
    assert start(samplers=samplers, runs=runs, images_seen=[8]) == 0                             # nothing is left to do


@pytest.mark.parametrize("change", [
    {"study": {"run": "base"}}, {"study": {"run": 1, "seed": 1, "images_seen": 8, "settings": {}}}, {"fid": "3"},
    {"fid": None}, {"seconds": []}, {"sampling_seconds": {}}, {"network_calls": "x"}, {"reference_fingerprint": []},
    {"reference_count": "many"}, {"fid_interval_95": [1]}, {"fid_interval_95": 3}, {"fit": [1]}, {"fit": {"b": None}},
    {"precision": "high"}, {"kid": [0.1]}, {"device": None}, {"grid": 1e400}])
def test_a_line_that_is_no_cell_is_told_at_once(tmp_path, change):
    """Not by a traceback of the report, when all is measured."""
    cell = Cell("base", 1, 8, {"timesteps": 2})
    whole = {"study": asdict(cell), "fid": 3.5, "seconds": 2, "sampling_seconds": 1.5, "network_calls": 2,
             "reference_fingerprint": "0" * 16, "reference_count": 40, "fid_interval_95": [3, 4.0], "fit": {"b": 1.01},
             "precision": 0.5, "kid": 0.1, "device": "cpu", "sampler": {"eta": 0.0}, "machine": "x86"}
    (tmp_path / "base-1.jsonl").write_text(json.dumps(whole) + "\n")
    assert read_cells(tmp_path) == {cell.key: whole}
    (tmp_path / "base-1.jsonl").write_text(json.dumps(whole) + "\n" + json.dumps({**whole, **change}) + "\n")
    if change.keys() <= {"device", "grid"}:                                # which the report does not read
        assert len(read_cells(tmp_path)) == 1
        return
    with pytest.raises(DataError, match="holds a line that is no cell of a study"):
        read_cells(tmp_path)


def test_a_picture_that_is_no_file_does_not_stop_the_report(tmp_path):
    (tmp_path / "pipe.png").mkdir()
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match="a.png: is not a file but a pipe"):
        to_html("t", [Picture(tmp_path / "a.png", "a")])
