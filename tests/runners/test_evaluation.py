"""References, the pass over images and its bookkeeping, with a feature network of 16 numbers that costs nothing."""

import json
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.schema import Config
from functions.frechet import frechet_distance
from functions.metrics import kid, precision_recall
from runners.evaluation import references
from runners.evaluation.metrics import (
    Collector,
    Evaluation,
    FileSource,
    MissingReference,
    Reference,
    append_log,
    choose_subset,
    count_name,
    default_name,
    evaluate_images,
    find_reference,
    holds_images,
    load_reference,
    make_reference,
)
from tests.faults import jobs
from utils.errors import DataError, UserError


class TinyNet:
    """A fixed random projection of the pixels."""

    dim, device, preprocess, fingerprint, source = 16, torch.device("cpu"), "pytorch-fid", "tiny", "a test"

    def __init__(self):
        self.weight = torch.randn(3 * 8 * 8, 16, generator=torch.Generator().manual_seed(0)) / 14
        self.images = 0

    def __call__(self, images):
        self.images += len(images)
        return (images.expand(-1, 3, -1, -1).float() / 255).flatten(1) @ self.weight

    def logits(self, features):
        raise UserError("an Inception Score needs the classifier")


def pixels(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), np.uint8)


def images_of(array):
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def reference_of(array, net, **changes):
    features = net(images_of(array)).double().numpy()
    reference = Reference(features.mean(0), np.cov(features, rowvar=False), len(array), **changes)
    reference.features = features.astype(np.float32)
    return reference


@pytest.fixture
def net():
    return TinyNet()


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
    stats, _, order = cached.gather()
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
        process.join(90)
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2))
    assert first == second
    for key, value in expected.items():
        assert first[0][key] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), key
    assert first[1] == 50 and first[3] == list(range(50))
    whole = Collector(net)
    evaluate_images(folder, whole)
    np.testing.assert_allclose(first[2], whole.stats.mean, rtol=1e-6)


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

    def mean(indices=None):
        collector, before = Collector(net), net.images
        evaluate_images(folder, collector, 16, cache=cache, indices=indices)
        return collector.stats.mean, net.images - before

    first, computed = mean()
    again, none = mean()
    some, none_again = mean(np.array([3, 7, 9]))
    assert (computed, none, none_again) == (50, 0, 0) and (first == again).all()
    np.testing.assert_allclose(some, net(images_of(pixels(50)[[3, 7, 9]])).double().mean(0), rtol=1e-6)
    Image.fromarray(pixels(1, seed=9)[0]).save(folder / "0" / "000003.png")
    changed, computed = mean()
    assert computed == 50 and not (changed == first).all()
    cache.write_bytes(b"nothing")
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
    Image.new("RGB", (9, 8)).save(broken)
    with pytest.raises(DataError, match=r"000030.png: 8x9, but .*000000.png is 8x8"):
        evaluate_images(folder, Collector(net))
    assert net.images == 0
    broken.write_bytes(good[:60])                                        # header intact, pixels cut
    with pytest.raises(DataError, match="000030.png"):
        evaluate_images(folder, Collector(net), 8)


def test_subsets():
    subset = choose_subset(1000, 100, 5, "x")
    assert len(set(subset)) == 100 and (np.diff(subset) > 0).all()
    assert (subset == choose_subset(1000, 100, 5, "x")).all() and (subset != choose_subset(1000, 100, 6, "x")).any()
    assert len(choose_subset(7, None, 0, "x")) == 7
    with pytest.raises(UserError, match="--num 8 images asked for, but x has 7"):
        choose_subset(7, 8, 0, "x")


def test_what_an_evaluation_refuses(net):
    plain = reference_of(pixels(30), net)
    del plain.features
    for metrics, message in ((["fid", "fod"], "'fod' is unknown; known: fid, is, kid, pr"),
                             (["kid"], "--cache_features"), (["is"], "classifier")):
        with pytest.raises(UserError, match=message):
            Evaluation(plain, net, metrics)
    for key, value in (("weights", "others"), ("preprocess", "tf1")):
        with pytest.raises(UserError, match=f"made with {key} '{value}' instead of"):
            Evaluation(reference_of(pixels(30), net, provenance={key: value}), net)
    Evaluation(reference_of(pixels(30), net, provenance={"weights": "others"}, forced=True), net)
    single = Evaluation(plain, net)
    single.update(images_of(pixels(1)), [0])
    with pytest.raises(UserError, match=r"1 image\(s\) given, fid needs at least 2"):
        single.results()


def test_bootstrap_and_the_warning_for_few_images(net, caplog):
    measured = Evaluation(reference_of(pixels(60), net), net, bootstrap=10)
    measured.update(images_of(pixels(12, seed=1)), range(12))
    results = measured.results()
    low, high = results["fid_interval_95"]
    assert low < results["fid"] < high and "singular" in caplog.text


# ---- references

@pytest.fixture
def wide(monkeypatch, tmp_path):
    """References of dimension 16, looked for in an empty folder."""
    monkeypatch.setattr(references, "DIM", 16)
    monkeypatch.setattr(references, "FOLDER", tmp_path / "pytorch_fid")
    (tmp_path / "pytorch_fid").mkdir()
    return tmp_path / "pytorch_fid"


def config_of(name="CIFAR10", size=32, **data):
    return Config.model_validate({"data": {"dataset": name, "image_size": size, **data}, "model": {"ch_mult": [1]}})


def statistics():
    features = np.random.default_rng(0).normal(size=(40, 16))
    return features.mean(0), np.cov(features, rowvar=False)


def test_every_format_loads(wide):
    mean, cov = statistics()
    np.savez(wide / "a.npz", mu=mean, sigma=cov)
    np.savez(wide / "adm.npz", mu=mean, sigma=cov, mu_s=mean, sigma_s=cov, arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    np.save(wide / "cifar10_train_stat.npy", {"mu": mean, "sigma": cov})
    (wide / "b.pkl").write_bytes(pickle.dumps({"mu": mean.astype(np.float32), "sigma": cov}))
    for name in ("a.npz", "adm.npz", "cifar10_train_stat.npy", "b.pkl"):
        reference = load_reference(wide / name)
        np.testing.assert_allclose(reference.mean, mean, rtol=1e-6)
        assert (reference.cov == cov).all() and reference.features is None and not holds_images(wide / name)
    assert load_reference(wide / "a.npz").fingerprint == load_reference(wide / "cifar10_train_stat.npy").fingerprint
    assert find_reference(config_of()).name == "cifar10_train_stat.npy"
    assert find_reference(stats="a.npz").name == "a.npz"


@pytest.mark.parametrize("content, message", [
    ({"mu": np.zeros(5), "sigma": np.eye(5)}, "another network or layer"),
    ({"mu": np.full(16, np.nan), "sigma": np.eye(16)}, "not finite"),
    ({"mu": np.zeros(16), "sigma": np.triu(np.ones((16, 16)))}, "no covariance"),
    ({"mu": np.zeros(16)}, "keys mu and sigma expected, found mu"),
    ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8)}, "it holds images: python fid.py ref --images"),
    ({"mu": np.array(["a"]), "sigma": np.eye(16)}, "not what they should be"),
])
def test_broken_statistics_are_refused(wide, content, message):
    np.savez(wide / "x.npz", **content)
    with pytest.raises(DataError, match=message):
        load_reference(wide / "x.npz")


def test_no_code_from_a_reference_runs(wide, tmp_path):
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return Path.touch, (marker,)

    np.save(wide / "cifar10_train_stat.npy", {"mu": Payload()})
    np.savez(wide / "evil.npz", mu=np.array(Payload(), dtype=object), sigma=np.eye(16))
    (wide / "half.npz").write_bytes((wide / "evil.npz").read_bytes()[:100])
    for name in ("cifar10_train_stat.npy", "evil.npz", "half.npz"):
        with pytest.raises(DataError, match=re.escape(name)):
            load_reference(wide / name)
    assert not marker.exists()


def test_a_missing_reference_says_how_to_make_it(wide):
    command = "python fid.py ref --config"
    with pytest.raises(MissingReference, match=f"{command} my.yml --out pytorch_fid/cifar10_train_stat.npz"):
        find_reference(config_of(), config_name="my.yml")
    with pytest.raises(MissingReference, match=f"{command} digits.yml --out pytorch_fid/digits-16x16-tf1.npz --prep"):
        find_reference(config_of("DIGITS", 16), preprocess="tf1")
    with pytest.raises(MissingReference, match=r"looked for elsewhere/x.npz.*--images FOLDER --out elsewhere/x.npz"):
        find_reference(stats="elsewhere/x.npz")
    with pytest.raises(UserError, match="name a file"):
        find_reference()
    assert default_name(config_of("LSUN", 256, category="church_outdoor")) == "lsun_church_stat.npy"
    assert default_name(config_of("LSUN", 256, category="tower")) == "lsun-tower-256x256.npz"


def test_provenance_travels_and_mismatches_are_refused(wide, net, tmp_path, caplog):
    digits = Config.model_validate(
        {"data": {"dataset": "DIGITS", "image_size": 8, "channels": 1},
         "model": {"in_channels": 1, "out_ch": 1, "ch": 32, "ch_mult": [1]}})
    made = make_reference(digits, net, root=tmp_path / "data", num=30, seed=2, keep_features=True)
    found = find_reference(digits)
    assert found.path == wide / "digits-8x8.npz" and found.fingerprint == made.fingerprint and found.count == 30
    assert (found.features == made.features).all() and found.features.shape == (30, 16)
    assert found.provenance.items() >= {"dataset": "DIGITS", "image_size": [8, 8], "weights": "tiny",
                                        "preprocess": "pytorch-fid", "subset_seed": 2, "transform": "resize"}.items()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    for config, preprocess, message in ((config_of(), "pytorch-fid", "dataset 'DIGITS' instead of 'CIFAR10'"),
                                        (config_of("DIGITS", 16), "pytorch-fid", r"\[8, 8\] instead of \[16, 16\]"),
                                        (digits, "tf1", "preprocess 'pytorch-fid' instead of 'tf1'")):
        with pytest.raises(UserError, match=message):
            find_reference(config, found.path, preprocess)
        assert find_reference(config, found.path, preprocess, force=True).forced
    found.provenance["transform"] = "center-crop"
    found.save(wide / "other.npz")
    with pytest.raises(UserError, match="transform 'center-crop' instead of 'resize'"):
        find_reference(digits, "other.npz")
    mean, cov = statistics()
    np.savez(wide / "unknown.npz", mu=mean, sigma=cov)
    caplog.clear()
    find_reference(digits, "unknown.npz")
    assert "does not say how it was made" in caplog.text


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


@pytest.mark.parametrize("count, name", [(50000, "FID-50k"), (5000, "FID-5k"), (1797, "FID-1797"), (1000, "FID-1k")])
def test_the_count_is_part_of_the_name(count, name):
    assert count_name(count) == name
