"""How a network is called: what ``auto`` chooses."""

import pytest
import torch

import generate
from runners import network
from runners.network import Network, fill_device, resolve_compile
from tests.conftest import TINY

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("shape, share, size", [
    ((3, 32, 32), 50000, 64), ((3, 256, 256), 50000, 1), ((3, 512, 512), 50000, 1), ((1, 8, 8), 7, 7)])
def test_batch_size_auto_on_a_cpu(shape, share, size):
    assert fill_device(Network(torch.nn.Identity(), CPU), shape, share) == size


@pytest.mark.parametrize("each, size", [(1e6, 2048), (100e6, 128), (200e9, 1)])
def test_batch_size_auto_fits_into_the_free_memory_of_a_gpu(each, size, monkeypatch):
    monkeypatch.setattr(network, "memory_of_an_image", lambda *args: (each, 30_000_000_000))
    assert fill_device(Network(torch.nn.Identity(), CUDA), (3, 32, 32), 50000) == size


def test_batch_size_auto_makes_the_same_images(trained, tmp_path):
    flags = ["--config", "digits.yml", *TINY[2:], "--exp", str(trained), "--no-fid", "--timesteps", "2",
             "--num_samples", "3", "--grid", "0"]
    for name, size in (("auto", "auto"), ("one", "1")):
        assert generate.main([*flags, "-i", str(tmp_path / name), "--batch_size", size]) == 0
    for file in sorted((tmp_path / "one").glob("*.png")):
        assert file.read_bytes() == (tmp_path / "auto" / file.name).read_bytes()


def test_compile_auto_is_for_long_runs_on_a_gpu():
    assert not resolve_compile("auto", CPU, 10**6)
    assert not resolve_compile("auto", CUDA, 100)
    assert resolve_compile("auto", CUDA, 10**6)
    assert resolve_compile("on", CPU, 1)
