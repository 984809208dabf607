"""How a network is called: what ``auto`` chooses."""

import math
from copy import deepcopy

import pytest
import torch

import generate
from configs.schema import load_config
from models import build_model
from runners import network
from runners.network import Network, fill_device, memory_format, resolve_compile
from runners.training.state import TrainingState
from tests.conftest import TINY

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("shape, share, size", [
    ((3, 32, 32), 50000, 64), ((3, 256, 256), 50000, 1), ((3, 512, 512), 50000, 1), ((1, 8, 8), 7, 7)])
def test_batch_size_auto_on_a_cpu(shape, share, size):
    assert fill_device(CPU, shape, share, None) == size


@pytest.mark.parametrize("each, side, size", [(1e6, 32, 2048), (100e6, 32, 128), (200e9, 32, 1), (1e6, 256, 32)])
def test_batch_size_auto_fits_into_the_free_memory_of_a_gpu(each, side, size, monkeypatch):
    monkeypatch.setattr(network, "memory_of_an_image", lambda *args: (each, 30_000_000_000))
    assert fill_device(CUDA, (3, side, side), 50000, None) == size


class FakeGPU:
    """A GPU's allocator, and a sampler that takes 10 MB for each image; the first call leaves 100 MB behind."""

    kept, peak = 0, 0

    def __init__(self, size, monkeypatch):
        self.size = size
        for name in ("memory_allocated", "reset_peak_memory_stats", "max_memory_allocated", "mem_get_info",
                     "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name, lambda *args: None))

    def memory_allocated(self, device):
        return self.kept

    def max_memory_allocated(self, device):
        return self.peak

    def mem_get_info(self, device):
        return self.size - self.kept, self.size

    def __call__(self, count):
        self.kept, self.peak = 100, 100 + 10 * count
        if self.peak > self.size:
            raise torch.OutOfMemoryError


@pytest.mark.parametrize("size, each, free", [(1000, 10, 900), (125, 10, 25), (115, math.inf, 15)])
def test_memory_of_an_image_is_not_that_of_the_first_call(size, each, free, monkeypatch):
    """Twelve images fit, or two, or no two."""
    assert network.memory_of_an_image(CPU, FakeGPU(size, monkeypatch)) == (each, free)


def test_batch_size_auto_makes_the_same_images(trained, tmp_path):
    flags = ["--config", "digits.yml", *TINY[2:], "--exp", str(trained), "--no-fid", "--timesteps", "2",
             "--num_samples", "3", "--grid", "0"]
    for name, size in (("auto", "auto"), ("one", "1")):
        assert generate.main([*flags, "-i", str(tmp_path / name), "--batch_size", size]) == 0
    for file in sorted((tmp_path / "one").glob("*.png")):
        assert file.read_bytes() == (tmp_path / "auto" / file.name).read_bytes()


def test_images_get_the_memory_format_of_the_weights():
    for layout in (torch.channels_last, torch.contiguous_format):
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 8, 3)).to(memory_format=layout)
        assert Network(model, CPU).memory_format == layout
    assert [memory_format(device, 32) for device in (CPU, CUDA)] == [torch.contiguous_format, torch.channels_last]


def test_compile_auto_is_for_long_runs_on_a_gpu_with_what_triton_needs(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(network.shutil, "which", lambda name: name == "gcc")
    monkeypatch.setattr(network.sysconfig, "get_path", lambda *names: str(tmp_path))
    assert "Python.h" in network.missing_for_triton() and not resolve_compile("auto", CUDA, 10**6)
    (tmp_path / "Python.h").write_text("")
    assert not resolve_compile("auto", CPU, 10**6)
    assert not resolve_compile("auto", CUDA, 100)
    assert resolve_compile("auto", CUDA, 10**6)
    assert resolve_compile("on", CPU, 1)
    monkeypatch.setattr(network.shutil, "which", lambda name: None)
    assert "gcc or clang" in network.missing_for_triton() and not resolve_compile("auto", CUDA, 10**6)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert "no Triton" in network.missing_for_triton()


def test_training_continues_in_another_memory_format():
    """A checkpoint of a GPU, where weights are channels_last, goes on a CPU, where narrow networks are not."""
    config = load_config("digits.yml", ["model.ch_mult=[1]", "model.num_res_blocks=1", "model.attn_resolutions=[]"])
    states = [TrainingState(build_model(config).to(memory_format=layout), config, 10)
              for layout in (torch.channels_last, torch.contiguous_format)]
    first, second = states
    gradients = [torch.randn(p.shape) for p in first.parameters]

    def step(state):
        for parameter, gradient in zip(state.parameters, gradients, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        state.update()

    step(first)
    second.load_state_dict(deepcopy(first.state_dict()))
    for state in states:
        step(state)
    for a, b in zip(first.parameters, second.parameters, strict=True):
        torch.testing.assert_close(a, b)
