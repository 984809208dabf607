"""What a study makes of its cells: read, compared in pairs, reported."""

import json
import os
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import yaml
from pydantic import ValidationError

from configs.study import STUDIES, Sampler, Study, load_study, study_yaml
from runners.study import comparisons
from runners.study.grid import Cell, cells_of, prepare_cells, read_cells
from runners.study.job import StudyJob
from runners.study.page import Picture, to_html
from runners.study.pairs import difference
from runners.study.report import write_report
from tests.test_study import TINY
from utils.errors import DataError


def report_of(exp, value, **changes) -> str:
    """Of numbers that are put in, ``value(cell)``: of the first metric, or {name: number}."""
    study = {**TINY, "seeds": [1, 2, 3], "images_seen": [8, 16], "metrics": ["digits_fd"], **changes}
    (exp / "tiny.yml").write_text(yaml.safe_dump(study, sort_keys=False))
    job = StudyJob(exp / "tiny.yml", exp)
    assert job.runs == [(run, seed) for seed in study["seeds"] for run in study["runs"]]  # cut short: whole comparisons
    (job.folder / "cells").mkdir(parents=True)
    for cell in job.all_cells:
        with (job.folder / "cells" / f"{cell.doc}.jsonl").open("a") as file:
            found = value(cell)
            numbers = found if isinstance(found, dict) else {study["metrics"][0]: found}
            file.write(json.dumps({"study": asdict(cell), **numbers, "network_calls": 2, "reference_count": 40,
                                   "reference_fingerprint": "", "sampling_seconds": 1.0, "seconds": 1.0}) + "\n")
    return write_report(job)[0].read_text()


def test_several_seeds_are_compared_in_pairs(tmp_path):
    """SA is 1 better than base with every seed, which differ by 10, and as good with half the images; a remedy while
    sampling hurts base, and what it does to SA is not known."""
    def value(cell):
        found = {1: 11.0, 2: 21.0, 3: 31.0}[cell.seed]
        if cell.images_seen == 16:
            found -= (cell.run == "SA") + 0.01 * cell.seed * (cell.run == "base")
        if "dcw" in cell.settings:
            found += {"base": 5 + 0.1 * cell.seed, "SA": cell.seed - 2}[cell.run]
        return found

    text = report_of(tmp_path, value, runs={"base": {"loss.lamda": 0}, "SA": {"loss.lamda": 1.0}}, samplers=[
        {"timesteps": [2]}, {"timesteps": [2], "images_seen": [8]}, {"timesteps": [2], "dcw": 0.1}])
    images, calls, sampling = (text.split(f"## Remedies {part}")[1].split("\n## ")[0] for part in (
        "in training, at equal images", "in training, at equal network calls", "while sampling"))
    assert "| DDIM | 2 | 20.980 ± 5.768 | **20.000 ± 5.774** |" in text                      # the spread of the seeds
    assert "**-0.980 ± 0.006**" in images and "SA: helps with 2 of 2 (DDIM 2, DDIM, DCW 0.1 2)." not in images
    assert "+0.020 ± 0.006" in calls and "**+0.020" not in calls and "SA: not distinguishable with 1 of 1." in calls
    assert "| **+5.200 ± 0.058** | +0.000 ± 0.577 |" in sampling
    assert "hurts with 1 of 2 (base in 2 steps), not distinguishable with 1." in sampling
    assert "share the seeds of their images" not in text and "and others for the next" in text


def test_a_report_says_where_all_cells_share_their_images(tmp_path):
    text = report_of(tmp_path, lambda cell: cell.seed, image_seeds="shared")
    assert "All training seeds share the seeds of their images" in text and "the same seeds in every cell" in text


def test_the_interval_of_one_seed_is_told_where_there_is_one(tmp_path):
    """None, null, ends that rounding has put on one side of the FID: no bar, and no word of it."""
    intervals = {"a": {}, "b": {"fid_interval_95": None}, "c": {"fid_interval_95": [100 + 5e-14] * 2},
                 "d": {"fid_interval_95": [99.0, 101.0]}}
    text = report_of(tmp_path, lambda cell: {"fid": 100.0, **intervals[cell.run]}, seeds=[1], metrics=["fid"],
                     runs={name: {} for name in "abcd"}, samplers=[{"timesteps": [2, 3]}])
    assert "| DDIM | 2 | **100.0** | **100.0** | **100.0** | **100.0 (99.0 to 101.0)** |" in text
    cells = text.split("## All cells")[1]
    assert cells.count("100.00 |  |") == 6 and "100.00 | 99.00 to 101.00 |" in cells
    assert "In brackets: the 95% interval" in text and "against 40 training images" in text


def test_an_interval_is_the_fids_and_the_digits_are_their_own_reference(tmp_path):
    numbers = {"digits_fd": 7.0, "fid": 3.0, "fid_interval_95": [2.0, 4.0], "inception_score_blocks": 5.5}
    text = report_of(tmp_path, lambda cell: numbers, seeds=[1], metrics=["digits_fd", "fid", "is_blocks"],
                     samplers=[{"timesteps": [2]}])
    assert "against the 1,797 real digits: comparable within" in text and "In brackets" not in text
    assert "| FID | Inception Score of blocks | 95% interval of FID |" in text and "| 3 | 5.5 | 2.00 to 4.00 |" in text


def test_equal_network_calls_are_counted_against_those_of_the_first_run(tmp_path):
    """Which takes two for each image itself: a run with two has no place there, one with four stands at half."""
    runs = {"SA": {"loss.lamda": 1.0}, "SA+IP": {"loss.lamda": 1.0, "loss.input_perturbation": 0.1},
            "SA+SS": {"loss.lamda": 1.0, "loss.scheduled_sampling": {"steps": 1}}}
    text = report_of(tmp_path, lambda cell: float(cell.images_seen), runs=runs, samplers=[
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


def test_a_cell_is_what_its_sampler_reads():
    samplers = [Sampler(timesteps=[5]), Sampler(timesteps=[5], eta=0.0),
                Sampler(timesteps=[5], sample_type="ddpm_noisy"),
                Sampler(timesteps=[5], sample_type="ddpm_noisy", var_type="fixedsmall")]
    assert [cell.label for cell in cells_of(Study.model_validate({**TINY, "samplers": samplers, "runs": {"a": {}}}))] \
        == ["DDIM", "ancestral, fixedlarge", "ancestral, fixedsmall"]
    with pytest.raises(ValidationError, match="eta is for generalized, not for ddpm_noisy"):
        Sampler(timesteps=[5], sample_type="ddpm_noisy", eta=0.5)


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


def test_a_single_pair_has_no_error():
    findings = SimpleNamespace(number=lambda value, sign="": f"{value:{sign}.1f}")
    runs = ({1: 3.0}, {1: 3.0, 2: 5.0}, {})
    shown = [comparisons._shown(findings, difference(run, {1: 1.0, 2: 2.0})) for run in runs]
    assert shown == ["+2.0 (one pair)", "+2.5 ± 0.5", ""]
