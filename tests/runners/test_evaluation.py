"""The pass over images and its bookkeeping, with a feature network of 16 numbers that costs nothing."""

import json
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from functions.frechet import frechet_distance
from functions.metrics import kid, precision_recall
from runners.evaluation.logs import json_log
from runners.evaluation.metrics import (
    Collector,
    Evaluation,
    FileSource,
    append_log,
    choose_subset,
    count_name,
    evaluate_images,
    holds_images,
    make_reference,
    needs,
    save_features,
    summary,
)
from tests.conftest import load_kept
from tests.faults import jobs
from tests.tiny_net import TinyNet, images_of, pixels, reference_of
from utils.errors import DataError, UserError


@pytest.fixture
def folder(tmp_path):
    for i, image in enumerate(pixels(50)):
        path = tmp_path / "images" / f"{i // 25}" / f"{i:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "images" / "manifest.json").write_text("{}")
    return tmp_path / "images"


# ---- the pass

def one_of_two_ranks(rank: int, out: str) -> None:
    torch.set_num_threads(1)
    net, world = TinyNet(), 2
    array, reference = pixels(90, seed=3), reference_of(pixels(120, seed=4), net)
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=world)
    measured = Evaluation(reference, net, ("fid", "kid", "pr"))
    batches = np.array_split(np.arange(len(array)), 9)[rank::world]
    for indices in reversed(batches):                                    # order must not matter
        measured.update(images_of(array[indices]), indices)
    cached = Collector(net)
    evaluate_images(Path(out) / "images", cached, 7, cache=Path(out) / "cache.npz")
    measured_again, order = cached.gather()
    stats = measured_again["pool"].stats
    Path(out, f"{rank}.json").write_text(
        json.dumps([measured.results(), stats.count, stats.mean.tolist(), order.tolist()]))
    torch.distributed.destroy_process_group()


def test_results_do_not_depend_on_ranks_order_or_batches(net, folder, tmp_path):
    array, reference = pixels(90, seed=3), reference_of(pixels(120, seed=4), net)
    alone = Evaluation(reference, net, ("fid", "kid", "pr"))
    for start in range(0, 90, 64):
        alone.update(images_of(array[start:start + 64]), range(start, min(90, start + 64)))
    alone.update(images_of(array[:0]), [])
    expected = alone.results()

    features = net(images_of(array))
    stats = features.double().mean(0), features.double().T.cov()
    assert expected["fid"] == pytest.approx(frechet_distance(*stats, reference.mean, reference.cov), rel=1e-9)
    assert expected["kid"] == pytest.approx(kid(reference.features, features).mean, rel=1e-9)
    assert (expected["precision"], expected["recall"]) == precision_recall(reference.features, features)
    assert (expected["name"], expected["num_images"], expected["reference_count"]) == ("FID-90", 90, 120)

    ranks = [jobs.SERVER.Process(target=one_of_two_ranks, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(jobs.PATIENCE)
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2))
    assert first == second
    for key, value in expected.items():
        assert first[0][key] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), key
    assert first[1] == 50 and first[3] == list(range(50))
    whole = Collector(net)
    evaluate_images(folder, whole)
    np.testing.assert_allclose(first[2], whole.stats.mean, rtol=1e-6)


def test_a_large_batch_goes_through_the_network_in_parts(net, monkeypatch):
    """Inception takes more memory for an image than most networks that are sampled."""
    sizes, images = [], images_of(pixels(600))
    monkeypatch.setattr(TinyNet, "__call__", lambda self, part, call=TinyNet.__call__: (
        sizes.append(len(part)), call(self, part))[1])
    collector = Collector(net, keep_features=True)
    collector.update(images, range(600))
    monkeypatch.undo()
    found, order = collector.gather()
    np.testing.assert_allclose(found["pool"].features, net(images).numpy(), rtol=1e-6)
    assert sizes == [256, 256, 88] and order.tolist() == list(range(600))


def test_folder_zip_and_npz_are_the_same_images(net, folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, str(path.relative_to(folder)))
    np.savez(tmp_path / "images.npz", arr_0=pixels(50))
    means = []
    for path in (folder, tmp_path / "images.zip", tmp_path / "images.npz"):
        collector = Collector(net)
        evaluate_images(path, collector, 16)
        means.append(collector.stats.mean)
        assert holds_images(path)
    assert (means[0] == means[1]).all() and (means[0] == means[2]).all()
    np.savez(tmp_path / "grey.npz", arr_0=pixels(4)[..., :1])
    evaluate_images(tmp_path / "grey.npz", Collector(net))


def test_cached_features_are_used_until_an_image_changes(net, folder, tmp_path):
    cache = tmp_path / "cache.npz"

    def mean(indices=None, spaces=("pool",)):
        collector, before = Collector(net, spaces=spaces), net.images
        evaluate_images(folder, collector, 16, cache=cache, indices=indices)
        save_features(cache, FileSource(folder), collector)
        return collector.stats.mean, net.images - before

    first, computed = mean()
    again, none = mean()
    some, none_again = mean(np.array([3, 7, 9]))
    assert (computed, none, none_again) == (50, 0, 0) and (first == again).all()
    np.testing.assert_allclose(some, net(images_of(pixels(50)[[3, 7, 9]])).double().mean(0), rtol=1e-6)
    Image.fromarray(pixels(1, seed=9)[0]).save(folder / "0" / "000003.png")
    changed, computed = mean()
    assert computed == 50 and not (changed == first).all()
    assert (mean(spaces=("pool", "spatial"))[1], mean(spaces=("pool", "spatial"))[1], mean()[1]) == (50, 0, 0)
    np.savez(cache, key=np.load(cache)["key"], indices=np.zeros((2, 2)), pool=np.zeros(3))
    assert mean()[1] == 50


def test_bad_images_are_refused_before_the_network_works(net, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    broken = folder / "1" / "000030.png"
    good = broken.read_bytes()
    for path, error, message in ((tmp_path / "empty", DataError, "no images"),
                                 (tmp_path / "none", UserError, "no such"),
                                 (tmp_path / "notes.txt", DataError, "notes.txt")):
        with pytest.raises(error, match=message):
            FileSource(path)
    broken.write_bytes(b"a text file")
    with pytest.raises(DataError, match=r"000030.png: unreadable"):
        evaluate_images(folder, Collector(net))
    broken.write_bytes(bomb())
    with pytest.raises(DataError, match="000030.png: unreadable.*bomb"):
        evaluate_images(folder, Collector(net))
    Image.new("RGB", (9, 8)).save(broken)
    with pytest.raises(DataError, match=r"000030.png: 8x9, but .*000000.png is 8x8"):
        evaluate_images(folder, Collector(net))
    assert net.images == 0
    broken.write_bytes(good[:60])                                        # header intact, pixels cut
    with pytest.raises(DataError, match="000030.png"):
        evaluate_images(folder, Collector(net), 8)


def bomb():
    """A PNG of a hundred bytes that claims 60,000 x 60,000 pixels."""
    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (60000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_damaged_arrays_of_samples_are_one_line(net, tmp_path):
    path = tmp_path / "samples_50x8x8x3.npz"
    np.savez(path, arr_0=pixels(50))
    whole = path.read_bytes()
    for damaged in (whole[:5000], whole[:-30], b"PK\x03\x04" + bytes(50), b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="samples_50x8x8x3.npz"):
            holds_images(path)
        with pytest.raises(DataError, match="samples_50x8x8x3.npz"):
            FileSource(path)


def test_subsets():
    subset = choose_subset(1000, 100, 5, "x")
    assert len(set(subset)) == 100 and (np.diff(subset) > 0).all()
    assert (subset == choose_subset(1000, 100, 5, "x")).all() and (subset != choose_subset(1000, 100, 6, "x")).any()
    assert len(choose_subset(7, None, 0, "x")) == 7
    with pytest.raises(UserError, match="--num 8 images asked for, but x has 7"):
        choose_subset(7, 8, 0, "x")


def test_subsets_of_edm():
    cases = [case for case in load_kept("evaluator")
             if case["kind"] == "subset" and case["max_size"] <= case["total"]]
    assert len(cases) > 1
    for case in cases:
        found = choose_subset(case["total"], case["max_size"], case["seed"], "x", "edm")
        assert found.tolist() == case["raw_idx"][:case["max_size"]]
    with pytest.raises(UserError, match="--subset_rule 'adm' is unknown; known: default, edm"):
        choose_subset(7, 2, 0, "x", "adm")


def test_what_an_evaluation_refuses(net):
    plain = reference_of(pixels(30), net)
    del plain.features
    known = "digits_fd, digits_unsure, fid, is, is_blocks, kid, pr, sfid"
    for metrics, message in ((["fid", "fod"], f"'fod' is unknown; known: {known}"),
                             (["kid"], "--cache_features"), (["is"], "classifier"), (["is_blocks"], "classifier"),
                             (["sfid"], "mu_s, sigma_s")):
        with pytest.raises(UserError, match=message):
            Evaluation(plain, net, metrics)
    with pytest.raises(UserError, match=r"reference .* holds the features of 3 image\(s\); pr needs at least 4"):
        Evaluation(reference_of(pixels(3), net), net, ["fid", "kid", "pr"])
    for key, value in (("weights", "others"), ("preprocess", "tf1")):
        with pytest.raises(UserError, match=f"made with {key} '{value}' instead of"):
            Evaluation(reference_of(pixels(30), net, provenance={key: value}), net)
    Evaluation(reference_of(pixels(30), net, provenance={"weights": "others"}, forced=True), net)
    single = Evaluation(plain, net)
    single.update(images_of(pixels(1)), [0])
    with pytest.raises(UserError, match=r"1 image\(s\) given, fid needs at least 2"):
        single.results()


def test_interval_and_the_warning_for_few_images(net, caplog):
    measured = Evaluation(reference_of(pixels(60), net), net, interval=True)
    measured.update(images_of(pixels(12, seed=1)), range(12))
    results = measured.results()
    low, high = results["fid_interval_95"]
    assert low < results["fid"] < high and (low + high) / 2 == pytest.approx(results["fid"], rel=1e-6)
    assert "singular" in caplog.text
    few = Evaluation(reference_of(pixels(60), net), net, interval=True)
    few.update(images_of(pixels(3, seed=1)), range(3))
    assert few.results()["fid_interval_95"] is None
    assert "95% interval         none: it needs 10 images or more, whose features differ" in summary(few.results())


def test_sfid_is_the_distance_of_the_spatial_features(net, tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=pixels(60))
    reference = make_reference(FileSource(tmp_path / "real.npz"), net, **needs(["sfid"]))
    assert reference.features is None
    before, measured = net.images, Evaluation(reference, net, ("fid", "sfid"))
    measured.update(images_of(pixels(40, seed=1)), range(40))
    assert net.images - before == 40                                     # one pass for both
    sets = [net.with_spatial(images_of(each))[1].double() for each in (pixels(60), pixels(40, seed=1))]
    expected = frechet_distance(*[value for each in sets for value in (each.mean(0), each.T.cov())])
    assert measured.results()["sfid"] == pytest.approx(expected, rel=1e-9)


# ---- the log

def test_log_lines(tmp_path):
    path = tmp_path / "deep" / "fid.txt"
    for value in (3.25, 17.125):
        append_log(path, "exp/logs/cifar10/model_500_ema.pth", {"fid": value, "name": "FID-5k"},
                   {"sampler": {"timesteps": "50"}, "seeds": "0-4999"})
    assert path.read_text() == ("Checkpoint cifar10/model_500_ema.pth  --> FID 3.25\n"
                                "Checkpoint cifar10/model_500_ema.pth  --> FID 17.125\n")
    entry = json.loads(path.with_suffix(".jsonl").read_text().splitlines()[1])
    assert (entry["fid"], entry["seeds"], entry["world_size"]) == (17.125, "0-4999", 1)
    assert entry["threads"] == torch.get_num_threads() and "torch" in entry["versions"]


@pytest.mark.parametrize("name, expected", [("fid.txt", "fid.jsonl"), ("lamda0.5", "lamda0.5.jsonl"),
                                            ("lamda0.1", "lamda0.1.jsonl"), ("fid", "fid.jsonl")])
def test_every_log_has_its_own_objects(tmp_path, name, expected):
    append_log(tmp_path / name, "a\nb/c", {"fid": 1.0, "name": "FID-9"}, {})
    assert json_log(tmp_path / name).name == expected and (tmp_path / expected).is_file()
    assert (tmp_path / name).read_text() == "Checkpoint a\\nb/c  --> FID 1.0\n"
    with pytest.raises(UserError, match="name the text file"):
        json_log("fid.jsonl")


@pytest.mark.parametrize("count, name", [(50000, "FID-50k"), (5000, "FID-5k"), (1797, "FID-1797"), (1000, "FID-1k")])
def test_the_count_is_part_of_the_name(count, name):
    assert count_name(count) == name
