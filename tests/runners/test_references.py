"""References: every format, what is refused, how one is made and what it must not replace."""

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from configs.schema import Config
from runners.evaluation import references
from runners.evaluation.metrics import (
    FileSource,
    MissingReference,
    complete_reference,
    default_name,
    find_reference,
    holds_images,
    load_reference,
    make_reference,
)
from tests.conftest import REPOSITORY
from tests.tiny_net import images_of, pixels
from utils.errors import DataError, UserError


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
    ({**FINE, "mu": np.full(16, 1j)}, "are not numbers"), ({**FINE, "sigma": np.eye(16) * 1j}, "are not numbers"),
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
    for root, name in (("/a/my photos.zip", "zip-my_photos-64x64.npz"), (None, "zip-64x64.npz")):
        assert default_name(config_of("ZIP", 64, root=root)) == name                 # two of them are no mix-up


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


@pytest.mark.parametrize("stats", ["../../x.npz", "{tmp}/x", "a/../../x"])
def test_a_configuration_cannot_have_a_reference_made_elsewhere(wide, net, tmp_path, monkeypatch, stats):
    """``--fid_stats auto`` in a stranger's run folder; a file that is there already may lie anywhere."""
    monkeypatch.chdir(tmp_path)
    config = config_of("FOLDER", 8, root=str(tmp_path)).replace("sampling.fid_stats", stats.format(tmp=tmp_path))
    with pytest.raises(UserError, match="--out makes it elsewhere: sampling.fid_stats .* must be a relative"):
        make_reference(config, net)
    np.savez(tmp_path / "x.npz", **FINE)
    here = config.replace("sampling.fid_stats", str(tmp_path / "x.npz"))
    assert find_reference(here).path == tmp_path / "x.npz"


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
