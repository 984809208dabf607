"""On a GPU: precision, layout, compilation and DDP of a network call. Needs torch and pytest alone."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from functions.denoiser import Denoiser
from functions.denoising import ddpm_steps, generalized_steps
from functions.losses import sequence_aware_loss
from functions.schedule import DiscreteSchedule
from runners.network import Network, explain_out_of_memory, fill_device, memory_format, resolve_amp
from utils.errors import UserError

pytestmark = pytest.mark.cuda


class Convolutions(nn.Module):
    """Wide enough that TF32 would show."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.time, self.last = nn.Linear(1, width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x, t):
        h = F.silu(self.first(x)) + self.time(t[:, None] / 1000)[:, :, None, None]
        return self.last(F.silu(self.second(h)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Convolutions().eval()


@pytest.fixture
def schedule():
    return DiscreteSchedule(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on(model, device, **options):
    return Network(model.to(device, memory_format=memory_format(device, 256)), device, **options)


@torch.no_grad()
def test_without_amp_there_is_no_tf32(network, device):
    """TF32 keeps 10 bits: an error of some 3e-4; float32 stays below 1e-5."""
    x, t = draws(4, 3, 16, 16), torch.full((4,), 500.0)
    exact = network.double()(x.double(), t.double())
    if device.type == "cuda":                                  # a user's own settings are set back
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    ours = on(network.float(), device)(x.to(device), t.to(device)).double().cpu()
    assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("amp, off", [(torch.bfloat16, 0.02), pytest.param(
    torch.float16, 0.003, marks=pytest.mark.cuda(only=True))])
@torch.no_grad()
def test_half_precision_is_near_and_cast_once_is_the_same(network, device, amp, off):
    x, t = draws(4, 3, 16, 16).to(device), torch.tensor([0.0, 10.0, 500.0, 999.0], device=device)
    full = on(network, device)(x, t)
    each, once = (on(network, device, amp=amp, frozen=frozen) for frozen in (False, True))
    assert each(x, t).dtype == torch.float32
    assert (each(x, t) - full).abs().max() < off * full.abs().max()
    for _ in range(2):
        torch.testing.assert_close(once(x, t), each(x, t), rtol=0, atol=0)


@pytest.mark.cuda(only=True)
@torch.no_grad()
def test_compiled_is_near_eager(network, device):
    x, t = draws(4, 3, 16, 16).to(device), torch.full((4,), 500.0, device=device)
    for amp, off in ((None, 1e-5), (torch.bfloat16, 0.02)):
        eager, compiled = (on(network, device, amp=amp, compiled=compiled, frozen=True)(x, t)
                           for compiled in (False, True))
        assert (eager - compiled).abs().max() < off * eager.abs().max()


@pytest.mark.cuda(only=True)
@torch.no_grad()
def test_a_network_call_can_be_captured_as_a_cuda_graph(network, device):
    """Nothing in it waits for the host or allocates outside the graph's pool."""
    called = on(network, device, amp=torch.bfloat16, frozen=True)
    x, t = draws(4, 3, 16, 16).to(device), torch.full((4,), 500.0, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = called(x, t)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = called(x, t)
    x.copy_(draws(4, 3, 16, 16, seed=1))
    graph.replay()
    assert not torch.equal(captured, expected)
    torch.testing.assert_close(captured, called(x, t), rtol=1e-2, atol=1e-2)


def test_the_loss_and_its_gradient_are_those_of_the_cpu(network, schedule, device):
    x0, noise, t = draws(4, 3, 16, 16).clamp(-1, 1), draws(3, 4, 3, 16, 16, seed=1), torch.tensor([0, 1, 500, 999])
    found = []
    for where in (torch.device("cpu"), device):
        network.zero_grad()
        denoiser = Denoiser(on(network, where), schedule)
        terms = sequence_aware_loss(denoiser, x0.to(where), t.to(where), noise.to(where), num_consecutive_steps=3)
        terms.total.mean().backward()
        found.append([terms.total.detach().cpu(), network.second.weight.grad.cpu().clone()])
    for cpu, other in zip(*found, strict=True):
        assert (cpu - other).abs().max() <= 1e-4 * cpu.abs().mean()


@pytest.mark.parametrize("steps", [generalized_steps, partial(generalized_steps, eta=1.0), ddpm_steps])
@torch.no_grad()
def test_chains_are_those_of_the_cpu(network, schedule, device, steps):
    found = []
    for where in (torch.device("cpu"), device):
        def noise(index, where=where):
            return draws(2, 3, 16, 16, seed=index).to(where)

        found.append(steps(Denoiser(on(network, where), schedule), draws(2, 3, 16, 16, seed=99).to(where),
                           [0, 300, 600, 900], noise_fn=noise).cpu())
    assert (found[0] - found[1]).abs().max() <= 1e-4 * found[0].abs().mean()


@pytest.mark.cuda(only=True)
@torch.no_grad()
def test_a_chain_never_waits_for_the_gpu(network, schedule, device):
    """Beyond the noise, which the CPU draws."""
    denoiser, x = Denoiser(on(network, device), schedule), draws(2, 3, 16, 16).to(device)
    generalized_steps(denoiser, x, [0, 300, 600, 900])
    torch.cuda.set_sync_debug_mode("error")
    try:
        generalized_steps(denoiser, x, [0, 300, 600, 900])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ddp_with_one_process(network, device, tmp_path, monkeypatch):
    """NCCL on a GPU, gloo on a CPU: the gradient is that of the bare network."""
    monkeypatch.setattr(os, "environ", {**os.environ})
    x, t = draws(4, 3, 16, 16).to(device), torch.full((4,), 500.0, device=device)
    gradients = []
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=f"file://{tmp_path}/store",
                            rank=0, world_size=1)
    try:
        for ddp in (False, True):
            network.zero_grad()
            called = on(network, device, ddp=ddp)
            with called.gradient_sync(now=True):
                called(x, t).square().sum().backward()
            gradients.append(network.second.weight.grad.clone())
        total = torch.ones(3, device=device)
        dist.all_reduce(total)
    finally:
        dist.destroy_process_group()
    assert total.tolist() == [1, 1, 1]
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[0].abs().max()


@pytest.mark.parametrize("options", [{}, {"amp": torch.bfloat16, "frozen": True}], ids=["fp32", "bf16"])
def test_batch_size_auto_fits(network, device, options):
    called = on(network, device, **options)
    size = fill_device(device, (3, 64, 64), 10**6, lambda count: called(torch.zeros(count, 3, 64, 64, device=device),
                                                                        torch.zeros(count, device=device)))
    assert size & (size - 1) == 0
    with torch.no_grad():
        called(torch.zeros(size, 3, 64, 64, device=device), torch.zeros(size, device=device))
    if device.type == "cuda":
        assert size > 16 and torch.cuda.max_memory_allocated() < 0.9 * torch.cuda.get_device_properties(0).total_memory


@pytest.mark.cuda(only=True)
def test_out_of_memory_is_a_line_that_names_the_keys(device):
    with pytest.raises(UserError, match="training.micro_batch_size"), explain_out_of_memory():
        torch.empty(2**48, device=device)


@pytest.mark.cuda(only=True)
def test_amp_auto_is_a_half_precision(device):
    assert resolve_amp("auto", device) in (torch.bfloat16, torch.float16)
