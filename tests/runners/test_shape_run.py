"""Rehearsal of fine-tuning by shapes alone, against the same step with numbers."""

import pytest
import torch

import train_ddp
from configs.pipelines import unet_settings
from configs.schema import load_config
from models import build_model
from models.pretrained import shape_of_pretrained
from runners.training.optimizer import MOMENTS, fixed_bytes, make_optimizer
from runners.training.shape_run import AutocastShapes, meta_inputs, recompute, step_bytes, step_flops
from utils.live_bytes import LiveBytes


def numbers_step(config, amp, checkpointing):
    """Peak of the same step with numbers, as ``LiveBytes`` counts it."""
    model = build_model(config).train()
    model.checkpointing = checkpointing
    x, t, rows = torch.randn(4, 4, 8, 8), torch.full((4,), 5.0), torch.randn(4, 16, 64)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = model(x, t, rows, torch.randn(4, 32), torch.ones(4, 6)).float().square().mean()
        loss.backward()

    step()                                                                  # the gradients are there now
    with LiveBytes() as live:
        step()
    return live.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [None, 4])
def test_shapes_take_as_much_as_numbers(sdxl, rank, checkpointing):
    config = load_config(sdxl, [f"model.lora_rank={rank}"] if rank else [])
    model = shape_of_pretrained(config, unet_settings(sdxl))
    if checkpointing:
        recompute(model, amp=False)
    inputs = meta_inputs(unet_settings(sdxl), (8, 8), 4, 16)
    assert step_flops(model, inputs) > 1e8
    assert step_bytes(model, inputs, amp=False) == pytest.approx(numbers_step(config, False, checkpointing), rel=0.1)


def test_types_are_those_of_autocast(sdxl):
    """Of products bf16, of norms float32; a trained weight is copied once."""
    linear, norm = torch.nn.Linear(4, 4, device="meta"), torch.nn.GroupNorm(1, 4, device="meta")
    x = torch.empty(2, 4, device="meta")
    with AutocastShapes(True) as shapes:
        assert linear(x).dtype == torch.bfloat16 and norm(linear(x)).dtype == torch.float32
    assert len(shapes.copies) == 2
    with AutocastShapes(False):
        assert linear(x).dtype == torch.float32


@pytest.mark.parametrize("name", sorted(MOMENTS))
def test_moments_are_those_that_the_optimizer_keeps(name, sdxl):
    config = load_config(sdxl, [f"optim.optimizer={name}", "training.ema=[]"])
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.Linear(5, 7))
    optimizer = make_optimizer(model.parameters(), config.optim)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    kept = sum(value.numel() for slots in optimizer.state.values() for value in slots.values()
               if torch.is_tensor(value) and value.ndim)
    assert fixed_bytes(model, config) == 4 * (2 * sum(p.numel() for p in model.parameters()) + kept)


def test_a_dry_run_prints_what_fits(sdxl, captioned, tmp_path, capsys):
    assert train_ddp.main(["--config", str(sdxl), "--data.root", str(captioned), "--exp", str(tmp_path), "--device",
                           "cpu", "--dry_run", "--training.batch_size", "4", "--verbose", "critical"]) == 0
    told = capsys.readouterr().out
    assert "489,252 trained; fits into 24 GB" in told and "LoRA, rank 8, checkpointing" in told
    assert "16" in told and "absent" in told and not list(tmp_path.iterdir())
