"""On a GPU: train_ddp.py and generate.py in every precision; what waits, what memory it takes; weights that move."""

import gc
import json

import pytest
import torch

pytest.importorskip("pydantic")

import generate  # noqa: E402
import train_ddp  # noqa: E402
from benchmarks.trace import profile_steps  # noqa: E402
from benchmarks.workload import Training, make_config, write_pictures  # noqa: E402
from configs.schema import load_config  # noqa: E402
from runners.diffusion import Diffusion  # noqa: E402
from runners.training.dry_run import training_memory  # noqa: E402
from tests.conftest import TINY  # noqa: E402

pytestmark = pytest.mark.cuda
HALVES = ["bf16", pytest.param("fp16", marks=pytest.mark.cuda(only=True))]
ONLY = pytest.mark.cuda(only=True)


@pytest.fixture
def train(device, tmp_path):
    """``train(name, *flags)`` trains in a folder of that name; returns its state and its losses."""
    def run(name, *flags):
        argv = [*TINY, "--device", device.type, "--exp", str(tmp_path / name), "--training.sample_num", "0", *flags]
        assert train_ddp.main(argv) == 0
        folder = tmp_path / name / "logs" / "digits"
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return torch.load(folder / "ckpt.pth", map_location="cpu", weights_only=True), [line["loss"] for line in lines]
    return run


@pytest.mark.parametrize("amp", HALVES)
def test_half_precision_learns_what_float32_learns(train, amp):
    _, full = train("full", "--amp", "off", "--training.max_steps", "30")
    state, half = train("half", "--amp", amp, "--training.max_steps", "30")
    assert all(value.dtype == torch.float32 for value in state["model"].values())
    assert sum(half[-10:]) < 0.8 * sum(half[:10])
    assert half[-10:] == pytest.approx(full[-10:], rel=0.1)          # fp16 skips steps until its scale has come down
    assert bool(state["grad_scaler"]) == (amp == "fp16")


@pytest.mark.parametrize("amp", ["off", *HALVES])
def test_a_resumed_run_goes_on_as_if_nothing_had_been(train, amp):
    """A GPU adds in no fixed order, so not to the bit."""
    flags = ["--amp", amp, "--training.max_steps", "8"]
    state, losses = train("whole", *flags)
    train("halves", *flags, "--max_steps", "4")
    again, resumed = train("halves", *flags, "--resume_training")
    assert again["step"] == state["step"] == 8 and resumed == pytest.approx(losses, rel=1e-3)
    assert again["grad_scaler"] == state["grad_scaler"]


@ONLY
def test_training_compiles(train):
    _, eager = train("eager", "--amp", "off", "--training.max_steps", "4", "--compile", "off")
    _, compiled = train("compiled", "--amp", "off", "--training.max_steps", "4", "--compile", "on")
    assert compiled == pytest.approx(eager, rel=0.2)                # dropout's random numbers are other ones


@pytest.mark.parametrize("amp", ["off", *HALVES])
def test_no_step_waits_for_the_device_between_logging_points(device, tmp_path, amp):
    """As the profiler's trace has it; on a GPU also as torch's own watch has it."""
    overrides = {"model.ch": 32, "model.ch_mult": [1], "model.num_res_blocks": 1, "model.attn_resolutions": [],
                 "training.log_freq": 1000, "optim.grad_clip": 1.0, "training.amp": amp}
    config = make_config(write_pictures(tmp_path / "pictures", 16, 32), 8, **overrides)
    step = Training(config, tmp_path, device)
    for _ in range(2):
        step()
    assert not profile_steps(step, 3, device).waits
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@ONLY
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_dry_run_predicts_the_allocators_peak(device, tmp_path, amp, checkpointing):
    config = make_config(write_pictures(tmp_path / "pictures", 64, 32), 32, name="cifar10_tiny.yml", **{
        "training.amp": amp, "training.activation_checkpointing": checkpointing, "model.ch": 64})
    gc.collect()                                     # of the cases before
    before = torch.cuda.memory_allocated()
    step = Training(config, tmp_path, device)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    peak = torch.cuda.max_memory_allocated() - before
    images = torch.zeros(2, *config.data.shape, dtype=torch.uint8)
    assert training_memory(step.diffusion, images, step.plan)[0] == pytest.approx(peak, rel=0.15)


def test_images_are_those_of_the_cpu(device, train, tmp_path):
    """Weights of one device in the other; noise comes from seeds."""
    train("run", "--training.max_steps", "3")
    folder, images = tmp_path / "run" / "logs" / "digits", []
    for where in ("cpu", device.type):
        sampled = Diffusion.from_run(folder, device=where).sample(range(4), timesteps=5, eta=1.0)
        images.append(torch.cat([batch.images.cpu() for batch in sampled]))
    assert (images[0] - images[1]).abs().max() < 1e-3


@pytest.mark.parametrize("flags", [["--batch_size", "auto"], ["--amp", "auto"]])
def test_generate(device, train, tmp_path, flags):
    train("run", "--training.max_steps", "2")
    argv = [*TINY[:2], *TINY[4:-2], "--device", device.type, "--exp", str(tmp_path / "run"), "--no-fid",
            "--timesteps", "3", "--num_samples", "5", "--grid", "0", "-i", str(tmp_path / "images"), *flags]
    argv = [word for word in argv if word != "--verbose"]
    assert generate.main(argv) == 0
    assert len(list((tmp_path / "images").glob("*.png"))) == 5


@ONLY
def test_sampling_takes_no_more_memory_for_more_steps(device):
    diffusion = Diffusion(load_config("cifar10_tiny.yml", ["data.root=."]), device)
    peaks = []
    for steps in (3, 30):
        torch.cuda.reset_peak_memory_stats()
        for _ in diffusion.sample(range(32), timesteps=steps, batch_size=32):
            pass
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] == pytest.approx(peaks[0], rel=0.02)


@ONLY
def test_the_golden_network(device, golden_unet, golden):
    from copy import deepcopy

    from runners.network import Network

    stored = golden("unet_a")
    network = Network(deepcopy(golden_unet).to(device, memory_format=torch.channels_last), device)
    with torch.no_grad():
        out = network(stored["x"].to(device), stored["t"].to(device)).cpu()
    assert (out - stored["out"]).abs().max() <= 3e-5 * stored["out"].abs().mean()
