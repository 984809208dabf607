"""Rehearse training of a network too large to be built here: its shape on the meta device, which has no numbers.

A forward and a backward pass are taken with shapes alone. What lives is counted, as autocast would have it: products
in bf16 from copies of the float32 weights, normalisations in float32, attention in one kernel that keeps no scores.
"""

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from configs.pipelines import takes_sizes, takes_text, unet_settings, vae_factor, vae_settings
from configs.shapes import FACTOR, SHAPES, TOKENS
from models.pretrained import shape_of_pretrained
from runners.training.optimizer import fixed_bytes
from utils.errors import UserError
from utils.hub import local_folder
from utils.live_bytes import LiveBytes
from utils.table import print_table

PRODUCTS = {F.linear, F.conv2d, torch.matmul, torch.bmm, torch.baddbmm, torch.conv2d, Tensor.matmul}
FLOAT32 = {F.group_norm, F.layer_norm, torch.group_norm, torch.layer_norm, torch.softmax, F.softmax, Tensor.softmax}
CARDS = (24, 40, 80)                                 # GiB
USABLE = 0.92                                        # of a card: the context and what the allocator cannot use
PEAKS = {"A100": 312e12, "H100": 989e12}             # dense bf16 products a second, as their makers state them
USED = 0.4                                           # share of that which U-Nets of this size reach
RANK = 8                                             # of the LoRA column where the configuration has none


def dry_run_pretrained(config, num_images: int | None, plan, absent: list[str]) -> None:
    """Print what a step of fine-tuning takes: whole or LoRA, with and without activation checkpointing."""
    settings, size, tokens = _shapes(config, absent)
    amp = config.training.amp != "off"
    copies = config.loss.terms
    rank = config.model.lora_rank or RANK
    rows, flops = {}, 0
    for name, lora_rank in (("all weights", None), (f"LoRA, rank {rank}", rank)):
        model = shape_of_pretrained(_with_rank(config, lora_rank), settings)
        trained, total = (sum(p.numel() for p in model.parameters() if every or p.requires_grad)
                          for every in (False, True))
        fixed = fixed_bytes(model, config)
        for checkpointing in (False, True):
            if checkpointing:
                recompute(model, amp)
            inputs = meta_inputs(settings, size, plan.micro_batch * copies, tokens)
            flops = flops or step_flops(model, inputs)
            live = step_bytes(model, inputs, amp)
            rows[name + (", checkpointing" if checkpointing else "")] = (
                f"{(fixed + live) / 2**30:.1f} GiB ({fixed / 2**30:.1f} weights and optimizer, {live / 2**30:.1f} the "
                f"step), {trained:,} trained; {_cards(fixed + live)}")
    step = flops * plan.accumulate
    print_table({
        "configuration": " ".join(f"{key}={value}" for key, value in config.loss),
        "network": f"{config.model.pretrained}, {total:,} parameters with the adapters",
        "batch": f"{plan.global_batch} = {plan.world_size} processes x {plan.accumulate} network calls x "
                 f"{plan.micro_batch} images, {copies} evaluation(s) each",
        "products": f"{step / 1e12:,.1f} TFLOP a step on each process" + "".join(
            f"; {step / (USED * peak):.2f} s on one {card} at {USED:.0%} of its peak" for card, peak in PEAKS.items()),
        **rows,
        "training images": f"{num_images:,}" if num_images else "unknown",
        "steps": f"{plan.total_steps:,} in the run",
        "absent": ", ".join(absent) or "nothing",
    })


def _cards(need: int) -> str:
    fitting = [f"{card}" for card in CARDS if need <= USABLE * card * 2**30]
    return f"fits into {fitting[0]} GB" if fitting else f"too much for {CARDS[-1]} GB"


def _with_rank(config, rank: int | None):
    model = config.model.model_copy(update={"lora_rank": rank, "lora_alpha": None})
    return config.model_copy(update={"model": model})


def _shapes(config, absent: list[str]) -> tuple[dict, tuple[int, int], int]:
    """Settings of the U-Net, (h, w) of what it sees, and tokens of a prompt."""
    data, name = config.data, config.model.pretrained
    try:
        folder = local_folder(name)
    except UserError:
        if name not in SHAPES:
            raise
        absent.append(f"{name} (its published shape stands in)")
        return SHAPES[name], (data.height // FACTOR, data.width // FACTOR), TOKENS
    settings, vae = unet_settings(folder), vae_settings(folder)
    factor = vae_factor(vae) if vae else 1
    return settings, (data.height // factor, data.width // factor), TOKENS


def recompute(model: nn.Module, amp: bool) -> None:
    """Activation checkpointing, whose second passes see the types of the first."""
    model.enable_gradient_checkpointing(partial(
        checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), AutocastShapes(amp))))


def meta_inputs(settings: dict, size: tuple[int, int], rows: int, tokens: int) -> tuple[Tensor, Tensor, dict]:
    """x, t and the condition of a network call with so many rows, without numbers."""
    with torch.device("meta"):
        x, t, condition = torch.empty(rows, settings["in_channels"], *size), torch.empty(rows), {}
        if takes_text(settings):
            condition["prompt_embeds"] = torch.empty(rows, tokens, settings["cross_attention_dim"])
        if takes_sizes(settings):
            times = 6 * settings["addition_time_embed_dim"]
            condition["pooled_embeds"] = torch.empty(rows, settings["projection_class_embeddings_input_dim"] - times)
            condition["time_ids"] = torch.empty(rows, 6)
    return x, t, condition


def step_bytes(model: nn.Module, inputs, amp: bool) -> int:
    """Bytes at the peak of a forward and backward pass beyond weights and gradients."""
    x, t, condition = inputs
    model.train()
    for p in model.parameters():
        p.grad = torch.empty_like(p) if p.requires_grad else None
    with torch.autograd.set_multithreading_enabled(False), LiveBytes() as live:        # modes belong to a thread
        with AutocastShapes(amp) as shapes:
            loss = model(x, t, **condition).float().square().mean()
        shapes.copies.clear()                            # what autocast does at the end of its block
        loss.backward()
    model.zero_grad(set_to_none=True)
    return live.peak


def step_flops(model: nn.Module, inputs) -> int:
    """Floating-point operations of products in a forward and backward pass; a pass of its own, because the counter
    keeps tensors alive."""
    x, t, condition = inputs
    with torch.autograd.set_multithreading_enabled(False), FlopCounterMode(display=False) as counter:
        with AutocastShapes(False) as shapes:
            loss = model(x, t, **condition).float().square().mean()
        loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() + shapes.flops


class AutocastShapes(TorchFunctionMode):
    """The types that autocast gives to operations, and attention as one kernel, where there are only shapes.

    Attributes:
        flops: Of attention, which the counter does not see.
        copies: Of trained weights, in bf16.
    """

    def __init__(self, enabled: bool):
        super().__init__()
        self.enabled, self.flops, self.copies = enabled, 0, {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (self._low(each) for each in args[:3])
            self.flops += 14 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]    # 4 there, 10 back
            return _Attention.apply(q, k, v)
        if self.enabled and func in PRODUCTS:
            args = [self._low(each) for each in args]
            kwargs = {key: self._low(each) for key, each in kwargs.items()}
        elif self.enabled and func in FLOAT32:
            args = [each.float() if isinstance(each, Tensor) else each for each in args]
        return func(*args, **kwargs)

    def _low(self, value):
        if not self.enabled or not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if isinstance(value, nn.Parameter) and value.requires_grad:          # autocast keeps these until the pass ends
            return self.copies.setdefault(id(value), value.to(torch.bfloat16))
        return value.to(torch.bfloat16)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])
