"""The benchmarks compare like with like: the reference procedure computes what this project computes. And what they
find out without a GPU: their steps run, and no step waits for the device."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_page, reference
from benchmarks.__main__ import check_markers, put
from benchmarks.trace import profile_steps
from benchmarks.workload import Training, make_config, write_pictures
from configs.schema import Config
from configs.training import Average
from functions.denoiser import Denoiser
from functions.denoising import generalized_steps
from functions.losses import sequence_aware_loss
from functions.pixels import to_uint8
from models import build_model
from models.ema import EMA, decay_of

CONFIG = Config.model_validate({
    "data": {"dataset": "ZIP", "image_size": 8},
    "model": {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0},
    "diffusion": {"num_diffusion_timesteps": 100}})


@pytest.fixture
def networks():
    ours, theirs = build_model(CONFIG), reference.build_reference(CONFIG, "cpu")
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("steps", [1, 3])
def test_same_loss_and_gradient_from_the_same_noise(networks, steps):
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(shape, generator=generator) for shape in ((4, 3, 8, 8), (steps, 4, 3, 8, 8)))
    t = torch.tensor([0, 1, 50, 99])                           # the first two mask some of the K terms
    betas = reference.make_betas(CONFIG, "cpu")
    lamda = 1.0 if steps > 1 else 0.0
    ours = sequence_aware_loss(Denoiser.of(CONFIG, networks[0]), x0, t, noise, num_consecutive_steps=steps, lamda=lamda)
    losses = [ours.total.mean(), reference.sequence_loss(networks[1], betas, x0, t, noise, steps, lamda)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    ours, theirs = (torch.cat([p.grad.flatten() for p in network.parameters()]) for network in networks)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(ours.abs().max()))


def test_same_average(networks):
    ours, theirs = EMA(networks[0], decay_of(Average(rate=0.9), 1)), reference.StackedEMA(networks[1], 0.9)
    for network in networks:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(1)
    ours.update(networks[0])
    theirs.update()
    values = {shape: iter(stack) for shape, stack in theirs.stacks.items()}
    for parameter in ours.module.parameters():
        torch.testing.assert_close(parameter, next(values[parameter.shape]))


def test_same_picture_from_the_same_noise(networks, tmp_path):
    x, steps = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), [0, 30, 60, 90]
    ours = generalized_steps(Denoiser.of(CONFIG, networks[0]), x, steps)
    reference.sample_and_save(networks[1], reference.make_betas(CONFIG, "cpu"), x, steps, tmp_path)
    written = torch.stack([(image + 1) / 2 * 255 for image in reference.Pictures(tmp_path, flip=False)]).round()
    assert (written - to_uint8(((ours + 1) / 2).clamp(0, 1))).abs().max() <= 1


SMALL = {"model.ch": 32, "model.ch_mult": [1], "model.num_res_blocks": 1, "model.attn_resolutions": [],
         "data.image_size": 8, "training.log_freq": 1000}


def test_both_procedures_take_steps_on_the_same_pictures(tmp_path):
    pictures = write_pictures(tmp_path / "pictures", 8, 8)
    config = make_config(pictures, 4, **SMALL)
    for step in (Training(config, tmp_path, "cpu"), reference.ReferenceTraining(config, pictures, "cpu", workers=0)):
        before = [p.detach().clone() for p in model_of(step).parameters()]
        assert step() == 4 and step() == 4
        assert not all(torch.equal(a, b) for a, b in zip(before, model_of(step).parameters(), strict=True))


def model_of(step):
    return step.diffusion.model if isinstance(step, Training) else step.network


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_reads_nothing_from_the_device_between_logging_points(tmp_path, precision):
    """Operators that would make the host wait are the same on a CPU, where a profiler sees them, too."""
    config = make_config(write_pictures(tmp_path / "pictures", 8, 8), 4, precision, **SMALL, **{"optim.grad_clip": 1.0})
    step = Training(config, tmp_path, "cpu")
    step()
    assert not profile_steps(step, 2, torch.device("cpu")).waits


def test_tables_of_another_kind_of_cpu_stay_and_a_new_kind_goes_below():
    page = "a\n<!-- train avx2 -->\nold\n<!-- end train avx2 -->\nb\n<!-- train cuda -->\n<!-- end train cuda -->\nc\n"
    again = put(page, "train", "avx2", "new")
    assert again == page.replace("old", "new")
    added = put(again, "train", "amx_bf16", "other")
    assert added == again.replace("b\n", "\n<!-- train amx_bf16 -->\nother\n<!-- end train amx_bf16 -->\nb\n")
    with pytest.raises(SystemExit, match="lacks tables of fid"):
        check_markers(page, ["train", "fid"])


def test_a_part_that_breaks_hangs_or_lacks_a_package_costs_itself_alone(monkeypatch):
    done, failed, hung = (gpu.run(["-c", code], 20 if "sleep" not in code else 1, {}) for code in (
        "print('fine')", "raise ValueError('no')", "import time; print('on', flush=True); time.sleep(60)"))
    assert [each.state for each in (done, failed, hung)] == ["done", "failed", "stopped"]
    assert failed.note == "ValueError: no" and "on" in hung.output
    monkeypatch.setitem(gpu.PARTS, "fid", gpu.Part("features", 60, ("torch", "no_such_package", "datasets_of_ours")))
    outcome = gpu.run_part("fid", None, None, 100)
    assert outcome.state == "left out" and outcome.note == "not installed: no_such_package, datasets_of_ours"


def figure(**changes):
    return {"part": "train-k2", "what": "step", "value": 8.0, "unit": "images/s", "reference": 4.0, "ratio": 2.0,
            "target": 4.0, "at_most": False, "met": False, "device": "cuda"} | changes


def test_the_page_says_where_it_was_made_and_what_is_below_target(monkeypatch):
    args, outcomes = SimpleNamespace(device="cpu", small=True), {"train-k2": gpu.Outcome("done", 1.0, "", "")}
    made = gpu.page(args, {"train-k2": "K = 2"}, outcomes, [figure(device="cpu")], "today", 2.0)
    assert "not made on a GPU" in made and gpu.NOT_A_GPU in made and "Below target" not in made and "2.00" not in made
    monkeypatch.setattr(gpu_page, "about", lambda *args: "")
    broken = figure(what="tests failed", part="tests", names=["t: a"], ratio=None, value=1, target=0)
    made = gpu.page(SimpleNamespace(device="cuda", small=False), {"train-k2": "K = 2"}, outcomes, [figure(), broken],
                    "today", 2.0)
    assert gpu.NOT_A_GPU not in made and "- step: 2, target 4" in made and "- t: a" in made
    assert "| step | 8 images/s | 4 | 2.00 | at least 4 | **no** |" in made


def test_figures_of_a_gpu_are_not_overwritten_by_a_cpu(tmp_path):
    args = SimpleNamespace(device="cpu", page=tmp_path / "gpu.md")
    gpu.check(args)
    args.page.write_text(gpu.NOT_A_GPU)
    gpu.check(args)
    args.page.write_text("measured")
    with pytest.raises(SystemExit, match="holds figures of a GPU"):
        gpu.check(args)
