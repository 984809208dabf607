"""References, the pass over images and its bookkeeping, with a feature network of 16 numbers that costs nothing."""

import json
import os
import pickle
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.schema import Config
from functions.frechet import frechet_distance
from functions.metrics import kid, precision_recall
from models import digit_classifier
from models.digit_classifier import DigitClassifier, load_digit_classifier
from runners.evaluation import references
from runners.evaluation.digits import real_digits, split, train
from runners.evaluation.metrics import (
    Collector,
    Evaluation,
    FileSource,
    MissingReference,
    Reference,
    append_log,
    choose_subset,
    complete_reference,
    count_name,
    default_name,
    evaluate_images,
    find_reference,
    holds_images,
    json_log,
    load_reference,
    make_reference,
    needs,
    save_features,
)
from tests.conftest import REPOSITORY, load_kept
from tests.faults import jobs
from utils.errors import DataError, UserError


class TinyNet:
    """A fixed random projection of the pixels."""

    dim, device, preprocess, fingerprint, source = 16, torch.device("cpu"), "pytorch-fid", "tiny", "a test"
    spatial_dim = 12

    def __init__(self):
        self.weight = torch.randn(3 * 8 * 8, 16, generator=torch.Generator().manual_seed(0)) / 14
        self.images = 0

    def __call__(self, images):
        self.images += len(images)
        images = torch.nn.functional.adaptive_avg_pool2d(images.expand(-1, 3, -1, -1).float() / 255, 8)
        return images.flatten(1) @ self.weight

    def with_spatial(self, images):
        features = self(images)
        return features, features[:, :12] ** 2

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

    def mean(indices=None, spaces=()):
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
    assert (mean(spaces=("spatial",))[1], mean(spaces=("spatial",))[1], mean()[1]) == (50, 0, 0)
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
    with pytest.raises(UserError, match="the interval needs at least 4"):
        few.results()


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


# ---- digits

def test_real_digits_are_near_themselves_and_torn_ones_far(net):
    """The study's question on 16x16 pictures, in grey and in RGB: halves of the real ones, noise, shuffled patches."""
    real, labels = real_digits([16, 16])
    found = {}
    for name, made in (("half", real[::2].expand(-1, 3, -1, -1)), ("torn", tear(real[::8].float(), 4).byte()),
                       ("noise", images_of(pixels(64))[:, :1])):
        measured = Evaluation(reference_of(pixels(30), net), net, ("digits_fd", "digits_unsure"))
        measured.update(made, range(len(made)))
        found[name] = measured.results()
    assert found["half"]["digits_fd"] < 1 and found["half"]["digits_unsure"] < 0.02
    assert found["torn"]["digits_fd"] > 50 and found["torn"]["digits_unsure"] > 0.5
    assert found["noise"]["digits_fd"] > 50 and found["noise"]["digits_unsure"] > 0.9
    other = reference_of(pixels(30), net, provenance={"dataset": "CIFAR10"})
    with pytest.raises(UserError, match="for data.dataset DIGITS; reference reference is of CIFAR10"):
        Evaluation(other, net, ("digits_fd",))


def tear(images, side):
    """Quarters of each picture in another order."""
    size = images.shape[-1] // 2
    rows = torch.cat([images[..., size:, :], images[..., :size, :]], -2)
    return torch.cat([rows[..., :size].flip(-1), rows[..., size:].flip(-2)], -1)


def test_the_shipped_classifier_knows_digits_it_was_not_trained_on():
    images, labels = real_digits([8, 8])
    kept, held_out = split(len(images))
    assert len(held_out) == 360 and not set(kept.tolist()) & set(held_out.tolist())
    classifier = load_digit_classifier()
    probabilities = classifier.probabilities(classifier(images[held_out]))
    assert (probabilities.argmax(1) == labels[held_out]).double().mean() > 0.99
    assert digit_classifier.WEIGHTS.stat().st_size < 200_000


def test_the_recipe_of_the_classifier_is_deterministic_and_learns():
    """All of it takes half a minute; its first steps here."""
    torch.rand(3)                                                        # global draws must not matter
    first, second = train(steps=60), train(steps=60)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    images, labels = real_digits([8, 8])
    classifier = DigitClassifier(first)
    assert (classifier.probabilities(classifier(images)).argmax(1) == labels).double().mean() > 0.8


def test_a_damaged_classifier_is_one_line(tmp_path):
    for content in (b"", b"not safetensors at all", digit_classifier.WEIGHTS.read_bytes()[:1000]):
        (tmp_path / "weights").write_bytes(content)
        with pytest.raises(DataError, match="weights: not the classifier of digits"):
            load_digit_classifier(weights=tmp_path / "weights")


# ---- references

@pytest.fixture
def wide(monkeypatch, tmp_path):
    """References of dimension 16, looked for in an empty folder."""
    monkeypatch.setattr(references, "DIM", 16)
    monkeypatch.setattr(references, "SPATIAL_DIM", 12)
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
    np.savez(wide / "adm.npz", mu=mean, sigma=cov, mu_s=mean[:12], sigma_s=cov[:12, :12], arr_0=pixels(9))
    np.save(wide / "cifar10_train_stat.npy", {"mu": mean, "sigma": cov})
    (wide / "b.pkl").write_bytes(pickle.dumps({"mu": mean.astype(np.float32), "sigma": cov}))
    edm2 = {"num_images": 50000, "fid": {"mu": mean, "sigma": cov}, "fd_dinov2": {"mu": mean[:4], "sigma": cov[:4, :4]}}
    (wide / "edm2.pkl").write_bytes(pickle.dumps(edm2))
    for name in ("a.npz", "adm.npz", "cifar10_train_stat.npy", "b.pkl", "edm2.pkl"):
        reference = load_reference(wide / name)
        np.testing.assert_allclose(reference.mean, mean, rtol=1e-6)
        assert (reference.cov == cov).all() and reference.features is None and not holds_images(wide / name)
        assert reference.mean.flags.writeable and reference.cov.flags.writeable      # else torch warns the user of it
    assert load_reference(wide / "a.npz").fingerprint == load_reference(wide / "cifar10_train_stat.npy").fingerprint
    assert find_reference(config_of()).name == "cifar10_train_stat.npy"
    assert find_reference(stats="a.npz").name == "a.npz"
    adm = load_reference(wide / "adm.npz")
    assert (adm.spatial[0] == mean[:12]).all() and (adm.spatial[1] == cov[:12, :12]).all()
    assert load_reference(wide / "a.npz").spatial is None and load_reference(wide / "edm2.pkl").count == 50000
    for name in ("adm.npz", "edm2.pkl"):                                 # programs that resize as TensorFlow 1
        with pytest.raises(UserError, match="'tf1' instead of 'pytorch-fid'.*give --preprocess tf1"):
            find_reference(stats=name, force=False)
        assert find_reference(stats=name, preprocess="tf1").name == name


def test_images_in_a_file_of_statistics_serve_kid_and_precision(wide, net):
    mean, cov = statistics()
    np.savez(wide / "adm.npz", mu=mean, sigma=cov, arr_0=pixels(9), arr_1=np.arange(9))
    reference = load_reference(wide / "adm.npz")
    complete_reference(reference, net, ["fid"])
    assert reference.features is None
    complete_reference(reference, net, ["fid", "pr"])
    np.testing.assert_allclose(reference.features, net(images_of(pixels(9))))
    assert (reference.mean == mean).all()


FINE = {"mu": np.zeros(16), "sigma": np.eye(16)}


def test_dinov2_statistics_alone_are_named(wide):
    (wide / "x.pkl").write_bytes(pickle.dumps({"num_images": 9, "fd_dinov2": {"mu": np.zeros(4), "sigma": np.eye(4)}}))
    with pytest.raises(DataError, match="holds no statistics of Inception, only fd_dinov2"):
        load_reference(wide / "x.pkl")


@pytest.mark.parametrize("content, message", [
    ({"mu": np.zeros(5), "sigma": np.eye(5)}, "another network or layer"),
    ({"mu": np.full(16, np.nan), "sigma": np.eye(16)}, "not finite"),
    ({"mu": np.zeros(16), "sigma": np.triu(np.ones((16, 16)))}, "no covariance"),
    ({"mu": np.zeros(16)}, "keys mu and sigma expected, found mu"),
    ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8)}, "it holds images: python fid.py ref --images"),
    ({"mu": np.array(["a"]), "sigma": np.eye(16)}, "are not numbers"),
    ({**FINE, "provenance": np.array("[1]")}, "provenance is not what fid.py ref writes"),
    ({**FINE, "provenance": np.array("{nonsense")}, "provenance is not what fid.py ref writes"),
    ({**FINE, "provenance": np.array("[" * 100000)}, "provenance is not what fid.py ref writes"),
    ({**FINE, "provenance": np.array('{"count": "many"}')}, "provenance is not what fid.py ref writes"),
    ({**FINE, "mu": np.zeros((1 << 10, 16))}, "another network or layer"),
    ({**FINE, "sigma": np.full((16, 16), "x")}, "are not numbers"),
])
def test_broken_statistics_are_refused(wide, content, message):
    np.savez(wide / "x.npz", **content)
    with pytest.raises(DataError, match=message):
        load_reference(wide / "x.npz")


@pytest.mark.parametrize("content, message", [
    ({"features": np.zeros((4, 5), np.float32)}, r"features float32 \(4, 5\), float \(N, 16\) expected"),
    ({"features": np.zeros((4, 16), int)}, "features int64"),
    ({"features": np.array(["a"])}, "features <U1"),
    ({"features": np.zeros((0, 16), np.float32)}, "features float32"),
    ({"features": np.full((4, 16), np.nan, np.float32)}, "not finite"),
    ({"features": np.zeros((4, 16), np.float32), "provenance": np.array('{"count": 5}')}, "4 features, but .* of 5"),
    ({"features": np.array([None])}, "features"),
    ({"mu_s": np.zeros(3), "sigma_s": np.eye(3)}, "mu_s .* another network or layer"),
    ({"mu_s": np.full(12, np.inf), "sigma_s": np.eye(12)}, "mu_s or sigma_s hold values that are not finite"),
])
def test_odd_features_are_refused_when_they_are_needed(wide, content, message):
    np.savez(wide / "x.npz", **FINE, **content)
    reference = load_reference(wide / "x.npz")
    with pytest.raises(DataError, match=message):
        _ = reference.features, reference.spatial


@pytest.mark.parametrize("change", [(b"'<f4'", b"'<q4'"), (b"(4, 16)", b"(4, 16L"), (b"(4, 16)", b"(9, 99)"),
                                    (b"\x93NUMPY", b"\x93NUMBER"[:6])])
def test_a_damaged_header_of_features_is_one_line(wide, change):
    np.savez(wide / "x.npz", **FINE, features=np.zeros((4, 16), np.float32))
    content = bytearray((wide / "x.npz").read_bytes())
    start = content.rindex(b"\x93NUMPY")
    content[start:] = content[start:].replace(*change, 1)
    (wide / "x.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"x.npz: array 'features' cannot be read"):
        _ = load_reference(wide / "x.npz").features


def test_a_pipe_is_not_waited_for(wide):
    os.mkfifo(wide / "x.npz")
    for load in (lambda: load_reference(wide / "x.npz"), lambda: find_reference(stats=wide / "x.npz")):
        with pytest.raises(DataError, match=r"x.npz: is not a file but a pipe"):
            load()


@pytest.mark.parametrize("values", [{"fid": {"mu": np.zeros(16)}}, {"fid": {**FINE}, "num_images": "x"}, {"fid": 3},
                                    {"fid": {**FINE}, "num_images": 1}, {"fid": {**FINE, "mu": "a"}}, [1]])
def test_odd_pickles_of_statistics_are_refused(wide, values):
    (wide / "x.pkl").write_bytes(pickle.dumps(values))
    with pytest.raises(DataError, match=r"x.pkl: "):
        load_reference(wide / "x.pkl")


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
        find_reference(config_of(), source=references.source_words("my.yml"))
    words = references.source_words("digits.yml", "my runs", ["data.root=a b"])
    with pytest.raises(MissingReference, match=f"{command} digits.yml --exp 'my runs' '--data.root=a b' --out "
                                               "pytorch_fid/digits-16x16-tf1.npz --preprocess tf1$"):
        find_reference(config_of("DIGITS", 16), preprocess="tf1", source=words)
    with pytest.raises(MissingReference, match="ref --images FOLDER --out pytorch_fid/digits-16x16.npz"):
        find_reference(config_of("DIGITS", 16))                       # a configuration that came with its weights
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
        with pytest.raises(UserError, match="fid.py ref$"):           # the caller has no flag to insist with
            find_reference(config, found.path, preprocess)
        with pytest.raises(UserError, match="or insist with --force"):
            find_reference(config, found.path, preprocess, force=False)
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


def test_the_folder_is_the_repositorys():
    assert (references.FOLDER / "README.md").is_file() and references.FOLDER == REPOSITORY / "pytorch_fid"


@pytest.mark.parametrize("category", ["../../x", "/tmp/x", "a\nb", "a/b"])
def test_a_category_cannot_lead_out_of_the_folder(wide, net, tmp_path, category):
    """``--fid_stats auto`` with a stranger's configuration."""
    config = config_of("LSUN", 64, category=category, root=str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    for attempt in (lambda: find_reference(config), lambda: make_reference(config, net)):
        with pytest.raises(UserError, match="data.category"):
            attempt()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_reference_never_replaces_a_file_of_someone_else(wide, net, tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=pixels(20))
    source = FileSource(tmp_path / "real.npz")
    for name, write in (("theirs.npz", lambda path: np.savez(path, **FINE)),
                        ("text.npz", lambda path: path.write_text("notes"))):
        write(wide / name)
        before = (wide / name).read_bytes()
        with pytest.raises(UserError, match=f"{name} exists and was not made by this program.*--overwrite"):
            make_reference(source, net, wide / name)
        assert (wide / name).read_bytes() == before
        assert make_reference(source, net, wide / name, overwrite=True).count == 20
        assert make_reference(source, net, wide / name, num=10).count == 10          # ours by now
    (wide / "folder.npz").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        make_reference(source, net, wide / "folder.npz", overwrite=True)


def test_an_npz_beside_an_absent_npy_is_read(wide, tmp_path, monkeypatch):
    """It used to be overwritten by ``--fid_stats auto``."""
    mean, cov = statistics()
    (tmp_path / "stats").mkdir()
    np.savez(tmp_path / "stats" / "mine.npz", mu=mean, sigma=cov)
    monkeypatch.chdir(tmp_path)
    config = Config.model_validate({**config_of().model_dump(mode="json"), "sampling": {"fid_stats": "stats/mine.npy"}})
    assert find_reference(config).path == Path("stats/mine.npz")


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
