"""Pickles, arrays and torch files of strangers: numbers come through, nothing else does, no file kills the process."""

import argparse
import os
import pickle
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from benchmarks.fuzz import mutate, pickle_seeds
from tests.conftest import REPOSITORY
from utils.errors import DataError
from utils.safe_load import load_pickle, load_torch


def written(tmp_path, content: bytes, name="x.pkl"):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


def refused(path, load=load_pickle) -> str:
    with pytest.raises(DataError) as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and error.value.code == 3
    return str(error.value)


ARRAYS = [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
          np.array(True), np.array([True, False]), np.zeros((0, 3), np.uint8), np.arange(3, dtype=">i4"),
          np.array([1 + 2j]), np.array(7, np.int8)]


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_plain_values_round_trip(tmp_path, protocol):
    tree = {"arrays": ARRAYS, b"bytes": b"\x00\xff", "scalar": np.float64(2.5), "empty": b"",
            "plain": [None, 1, (2.5,)], "shared": [ARRAYS[0], ARRAYS[0]]}
    loaded = load_pickle(written(tmp_path, pickle.dumps(tree, protocol)))
    for got, array in zip(loaded.pop("arrays"), ARRAYS, strict=True):
        assert got.dtype == array.dtype and got.shape == array.shape
        np.testing.assert_array_equal(got, array)
    assert loaded["shared"][0] is loaded["shared"][1]
    np.testing.assert_array_equal(loaded.pop("shared")[0], ARRAYS[0])
    assert loaded == {key: tree[key] for key in (b"bytes", "scalar", "empty", "plain")}


def test_a_dictionary_saved_as_npy(tmp_path):
    np.save(tmp_path / "s.npy", {"mu": np.arange(3.0)}, allow_pickle=True)
    np.testing.assert_array_equal(load_pickle(tmp_path / "s.npy")["mu"], np.arange(3.0))
    np.save(tmp_path / "a.npy", np.arange(3.0))
    assert "an array, not a pickled object" in refused(tmp_path / "a.npy")


def test_lists_that_hold_themselves(tmp_path):
    circle = [np.arange(2)]
    circle.append((circle, {"again": circle}))
    loaded = load_pickle(written(tmp_path, pickle.dumps(circle)))
    assert loaded[1][0] is loaded and loaded[1][1]["again"] is loaded and loaded[0].tolist() == [0, 1]


# --------------------------------------------------------------------------------- the attack, with a harmless payload

def calling(name: bytes, arguments: bytes) -> bytes:
    """The pickle of ``numpy.NAME(*arguments)``."""
    return b"\x80\x04cnumpy\n" + name + b"\n" + arguments + b"R."


DTYPE = b"cnumpy\ndtype\n(VO8\n\x89\x88tR"                     # dtype("O8", False, True)
RECONSTRUCT = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
POINTERS = b"C\x08" + b"A" * 8                               # what would become the address of an object
FLOATS = b"cnumpy\ndtype\n(Vf8\n\x89\x88tR(K\x03V<\nNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK"
ATTACKS = {
    "an array of pointers": calling(b"ndarray", b"(K\x01\x85" + DTYPE + POINTERS + b"t"),
    "an array of pointers with a shape": calling(b"ndarray", b"()" + DTYPE + POINTERS + b"t"),
    "pointers through BUILD": b"\x80\x04" + RECONSTRUCT + b"(K\x01K\x01\x85" + DTYPE + b"\x89" + POINTERS + b"tb.",
    "forged flags of a dtype": b"\x80\x04" + RECONSTRUCT + b"(K\x01K\x01\x85" + FLOATS + b"\x3ftb\x89" + POINTERS
                               + b"tb.",
    "a dtype with fields": b"\x80\x04" + RECONSTRUCT + b"(K\x01K\x01\x85" + FLOATS.replace(b"NNN", b"NN}")
                           + b"\x00tb\x89" + POINTERS + b"tb.",
    "void": b"\x80\x04" + RECONSTRUCT + b"(K\x01K\x01\x85" + FLOATS.replace(b"f8", b"V8") + b"\x00tb\x89" + POINTERS
            + b"tb.",
    "more numbers than bytes": b"\x80\x04" + RECONSTRUCT + b"(K\x01J\x00\x00\x00\x40\x85" + FLOATS + b"\x00tb\x89"
                               + POINTERS + b"tb.",
    "a function that is changed": b"\x80\x04cnumpy\ndtype\n}V__defaults__\n)sb.",
    "an object of a class": b"\x80\x04cnumpy\nndarray\n)\x81.",
    "a memo of 16 GiB": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "tuples that overflow the stack": b"\x80\x04})" + b"\x85" * 200_000 + b"K\x01s.",
    "code": pickle.dumps(subprocess.getoutput),
    "text that never ends": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x00abc.",
}


@pytest.fixture(scope="module")
def fates(tmp_path_factory):
    """What became of each attack in a process of its own: the exit code, and how much memory it had."""
    folder = tmp_path_factory.mktemp("attacks")
    code = ("import re, sys\nfrom utils.errors import DataError\nfrom utils.safe_load import load_pickle\n"
            "try:\n    print(repr(load_pickle(sys.argv[1])))\nexcept DataError as error:\n    print(error)\n"
            "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])")
    running = {}
    for i, (name, content) in enumerate(ATTACKS.items()):
        path = written(folder, content, f"{i}.npy")
        running[name] = subprocess.Popen([sys.executable, "-c", code, path], cwd=REPOSITORY, text=True,
                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if i % 4 == 3:
            running[name].wait()
    return {name: (process.communicate(), process.returncode) for name, process in running.items()}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_and_the_process_lives(fates, attack):
    (out, errors), code = fates[attack]
    assert code == 0, errors
    message, peak = out.splitlines()
    assert "not loaded, only arrays and plain values are" in message
    assert int(peak) < 200_000                                                       # kB


def test_mutated_pickles_never_kill_the_process(tmp_path):
    """2,000 mutations of files that numpy writes, in a process that must not die; 100,000 in the soak."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.fuzz", "--only", "pickles", "--cases", "2000", "--seed",
                           "7"], cwd=REPOSITORY, text=True, capture_output=True)
    assert done.returncode == 0 and "2,000 mutations" in done.stdout, done.stdout + done.stderr


def test_mutations_reach_the_arrays(tmp_path):
    """The fuzzer is no use if every mutation is caught by the first byte: some still load, and most differ."""
    rng, outcomes = random.Random(1), []
    for _ in range(200):
        path = written(tmp_path, mutate(rng.choice(pickle_seeds()), rng))
        try:
            outcomes.append(type(load_pickle(path)).__name__)
        except DataError as error:
            outcomes.append(str(error))
    assert 5 < outcomes.count("dict") < 195 and len(set(outcomes)) > 20


# ----------------------------------------------------------------------------------------------------- kinds of files

@pytest.mark.parametrize("load", [load_pickle, load_torch])
def test_what_is_no_file_is_refused_at_once(tmp_path, load):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    assert "a pipe" in refused(tmp_path / "pipe", load)
    assert "a device" in refused(tmp_path / "zero", load)
    assert "a folder" in refused(tmp_path, load)
    assert "No such file" in refused(tmp_path / "none", load)


def test_a_pickle_larger_than_any_of_arrays(tmp_path):
    with open(tmp_path / "huge.npy", "wb") as file:
        file.truncate(300 << 20)
    assert "300.0 MiB: a pickle may have 256 MiB at most" in refused(tmp_path / "huge.npy")


@pytest.mark.parametrize(("content", "message"), [
    (b"<!DOCTYPE html>\n<html>login</html>", "a web page, not weights"), (b"\n <html>", "a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS"),
    (b"", "it is empty"), (b"PK nothing", "truncated, or no torch file"), (b"hello", "truncated, or no torch file")])
def test_what_a_download_gave_instead_of_weights(tmp_path, content, message):
    assert message in refused(written(tmp_path, content, "w.pth"), load_torch)


@pytest.fixture
def weights(tmp_path):
    torch.save({"w": torch.arange(64.0), "step": 3}, tmp_path / "w.pth")
    return tmp_path / "w.pth"


def test_a_flipped_bit_is_found(weights):
    content = bytearray(weights.read_bytes())
    content[content.index(np.arange(64, dtype=np.float32).tobytes()) + 100] ^= 1
    weights.write_bytes(content)
    assert torch.load(weights, weights_only=True)["step"] == 3                       # torch does not notice
    assert "the CRC-32 of w/data/0 is another" in refused(weights, load_torch)


def test_files_without_checksums_and_of_the_old_format_load(tmp_path, weights):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(64.0)}, tmp_path / "without.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save({"w": torch.arange(64.0)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for path in (weights, tmp_path / "without.pth", tmp_path / "old.pth"):
        assert torch.equal(load_torch(path)["w"], torch.arange(64.0))


def test_torch_files_that_claim_too_much(tmp_path, weights):
    with zipfile.ZipFile(weights) as archive, zipfile.ZipFile(tmp_path / "z.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for info in archive.infolist():
            bomb.writestr(info.filename, archive.read(info))
    assert "compressed" in refused(tmp_path / "z.pth", load_torch)
    with zipfile.ZipFile(tmp_path / "t.pth", "w") as archive:
        archive.writestr("w/data.pkl", b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.")
        archive.writestr("w/version", b"3\n")
    assert "20,000 tuples" in refused(tmp_path / "t.pth", load_torch)
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    torch.save({"w": nested}, tmp_path / "n.pth")
    assert "asks for torch._utils._rebuild_nested_tensor" in refused(tmp_path / "n.pth", load_torch)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tensor_that_repeats_its_numbers_is_refused(tmp_path, legacy):
    """A stride of zero makes 4 TB of one number, which whoever copies or digests the tensor would write out."""
    endless = torch.zeros(1).expand(10**12)
    for inside in ([{"a": [torch.zeros(2)]}, ({"b": endless},)], {"c": argparse.Namespace(d=[endless])}):
        torch.save(inside, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
        assert "a tensor of 1,000,000,000,000 numbers of which it holds 1" in refused(tmp_path / "x.pth", load_torch)
    torch.save(torch.arange(6.0).view(2, 3).T, tmp_path / "y.pth", _use_new_zipfile_serialization=not legacy)
    assert torch.equal(load_torch(tmp_path / "y.pth"), torch.arange(6.0).view(2, 3).T)
