"""From a bare module to what a training step or a sampler calls: precision, memory layout, compilation, DDP."""

from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILE_FROM_STEPS = 2000                            # fewer steps do not earn back the minutes of compiling


def resolve_amp(name: str, device: torch.device) -> torch.dtype | None:
    """``auto``: on CUDA bf16 where the GPU has it, else fp16; on CPU off.

    Raises:
        UserError: fp16 on CPU, where it is slow and its gradients underflow.
    """
    if name == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name == "fp16" and device.type == "cpu":
        raise UserError("amp fp16 needs a CUDA GPU; on this device use bf16 or off")
    return AMP[name]


def resolve_compile(name: str, device: torch.device, steps: int) -> bool:
    """``auto``: on CUDA, where at least COMPILE_FROM_STEPS network calls follow."""
    return name == "on" or (name == "auto" and device.type == "cuda" and steps >= COMPILE_FROM_STEPS)


@contextmanager
def explain_out_of_memory():
    """Turn CUDA's out-of-memory error into a UserError that names the keys to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).partition(". ")[0]
        raise UserError(f"{first}; train with a smaller training.micro_batch_size (the same result, in more calls) or "
                        "training.batch_size, sample with a smaller --batch_size") from None


class Network:
    """eps(x, t) in float32, whatever runs inside.

    Args:
        model: The bare module; its weights stay float32.
        device: Where it lies.
        amp: Autocast type, or None.
        compiled: Pass it through torch.compile.
        ddp: Average gradients over ranks; needs a process group.
        accumulate: Backward passes in one step.
    """

    def __init__(self, model: nn.Module, device: torch.device, amp: torch.dtype | None = None, *,
                 compiled: bool = False, ddp: bool = False, accumulate: int = 1):
        self.device, self.amp = device, amp
        self.module = torch.compile(model) if compiled else model
        if ddp:
            self.module = DistributedDataParallel(
                self.module, device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True, static_graph=accumulate == 1)           # no_sync must not come first then

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, C, H, W), t (B,) -> (B, C, H, W)"""
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            return self.module(x.contiguous(memory_format=torch.channels_last), t).float()

    def gradient_sync(self, now: bool):
        """Context of a backward pass: average the gradients over ranks at its end, or only accumulate them."""
        wait = not now and isinstance(self.module, DistributedDataParallel)
        return self.module.no_sync() if wait else nullcontext()
