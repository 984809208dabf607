"""From a bare module to what a training step or a sampler calls: precision, memory layout, compilation, DDP."""

import logging
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from math import inf
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.precision import forbid_tf32
from runners.frozen import cast_once
from utils.cpu import BF16, bf16_pays, cpu_kind, instruction_sets
from utils.errors import UserError

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILE_FROM_CALLS = 2000                            # fewer do not earn back the minutes of compiling
WIDE = 128                                           # channels from which channels_last pays on a CPU
CPU_PIXELS = 64 * 1024                               # of batch_size auto
GPU_BATCH, GPU_SHARE = 2048, 0.6                     # of batch_size auto: at most, and of the free memory
GPU_PIXELS = 2**21                                   # likewise: kernels that index by int32 take no more of wide layers
PROBES = ((4, 12), (1, 2))                           # images of the calls that measure memory; if those fit
log = logging.getLogger(__name__)


def resolve_amp(name: str, device: torch.device) -> torch.dtype | None:
    """Type of autocast, or None, from ``training.amp`` or ``--amp``; ``auto`` as ``auto_amp`` has it.

    Raises:
        UserError: fp16 on CPU, where it is slow and its gradients underflow.
    """
    if name == "fp16" and device.type == "cpu":
        raise UserError("amp fp16 needs a CUDA GPU; on this device use bf16 or off")
    return AMP[auto_amp(device)[0] if name == "auto" else name]


def auto_amp(device: torch.device) -> tuple[str, str]:
    """What ``auto`` chooses, a key of AMP, and why: bf16 where the device itself multiplies it."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has it"
        return "fp16", "this GPU has no bf16"
    sets = instruction_sets()
    if bf16_pays(sets):
        return "bf16", f"this CPU has {cpu_kind(sets)}"
    return "off", f"this CPU has neither {' nor '.join(sorted(BF16))}"


def amp_name(dtype: torch.dtype | None) -> str:
    """The key of AMP."""
    return next(name for name, each in AMP.items() if each is dtype)


def explain_amp(name: str, device: torch.device) -> str:
    """For the log: ``off``, or ``auto: bf16, this CPU has avx512_bf16``."""
    return f"auto: {', '.join(auto_amp(device))}" if name == "auto" else name


def resolve_compile(name: str, device: torch.device, calls: int) -> bool:
    """``auto``: on CUDA, where at least COMPILE_FROM_CALLS network calls follow and Triton has what it needs; not on a
    CPU, where training gains nothing (sampling: ``runners.compilation``). Says in the log why."""
    if name != "auto":
        return name == "on"
    hindrances = {"a CPU runs without": device.type == "cpu",
                  f"{calls} network calls, {COMPILE_FROM_CALLS} pay for it": calls < COMPILE_FROM_CALLS}
    reason = next((reason for reason, hinders in hindrances.items() if hinders), None) or missing_for_triton()
    log.info("compile auto: %s (%s)", "off" if reason else "on", reason or f"{calls} network calls")
    return reason is None


def missing_for_triton() -> str | None:
    """What the compiler of CUDA kernels lacks on this machine."""
    from torch.utils._triton import has_triton

    if not has_triton():
        return "no Triton for this GPU"
    if not any(map(shutil.which, ("gcc", "clang"))):
        return "no gcc or clang for Triton; with another one set compile on"
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists():
        return "no Python.h for Triton: the headers of Python, python3-dev"
    return None


def fill_device(device: torch.device, shape: tuple[int, int, int], share: int, make: Callable[[int], object]) -> int:
    """Images of one batch of sampling, for ``--batch_size auto``; says in the log why.

    On a GPU as many as fit, by the memory that few images take. A CPU gains nothing from more than keep its cores
    busy, so there it is CPU_PIXELS together.

    Args:
        shape: (C, H, W) of what the network is called with.
        share: Images that this process has to make; more are never chosen.
        make: Makes so many images as sampling does, with whatever guides it, not compiled; a few steps will do.
    """
    if device.type == "cuda":
        each, free = memory_of_an_image(device, make)
        fitting = min(GPU_BATCH, GPU_PIXELS // (shape[1] * shape[2]), int(GPU_SHARE * free / each))
        reason = f"{each / 2**20:.0f} MiB for each image, {free / 2**30:.1f} GiB free"
    else:
        fitting, reason = CPU_PIXELS // (shape[1] * shape[2]), f"{CPU_PIXELS:,} pixels at a time on a CPU"
    chosen = min(power_of_two(fitting), max(1, share))
    log.info("batch_size auto: %d (%s)", chosen, reason)
    return chosen


def power_of_two(limit: int) -> int:
    """The largest that is not above ``limit``, at least 1."""
    return 1 << (max(1, limit).bit_length() - 1)


@torch.no_grad()
def memory_of_an_image(device: torch.device, make: Callable[[int], object]) -> tuple[float, int]:
    """Bytes at the peak of ``make`` for each further image, and bytes that are free on this GPU."""
    def peak_of(count: int) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        make(count)
        return torch.cuda.max_memory_allocated(device) - before

    each = inf                                   # not even two fit
    for few, many in PROBES:
        with suppress(torch.OutOfMemoryError):
            peak_of(few)                         # the first call leaves cast weights and workspaces behind
            each = (peak_of(many) - peak_of(few)) / (many - few)
            break
    torch.cuda.empty_cache()
    return max(each, 1.0), torch.cuda.mem_get_info(device)[0]


@contextmanager
def explain_out_of_memory():
    """Turn CUDA's out-of-memory error into a UserError that names the keys to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).partition(". ")[0]
        raise UserError(f"{first}; train with a smaller training.micro_batch_size (the same result, in more calls) or "
                        "training.batch_size, sample with a smaller --batch_size") from None


def memory_format(device: torch.device, width: int) -> torch.memory_format:
    """Of weights and activations: channels_last, but on a CPU narrow networks are faster without, up to twice in bf16.

    Args:
        width: Channels at the highest resolution.
    """
    narrow = device.type == "cpu" and width < WIDE
    return torch.contiguous_format if narrow else torch.channels_last


class Network:
    """The network's output in float32, whatever runs inside; what is no ``amp`` there is float32 too, not TF32.

    Args:
        model: The bare module; its weights stay float32, and images get their memory format.
        device: Where it lies.
        amp: Autocast type, or None.
        compiled: Pass it through torch.compile.
        ddp: Average gradients over ranks; needs a process group.
        accumulate: Backward passes in one step.
        frozen: The weights stay as they are at the first call, which casts them to ``amp`` once for all calls; for
            sampling only, without gradients.
    """

    def __init__(self, model: nn.Module, device: torch.device, amp: torch.dtype | None = None, *,
                 compiled: bool = False, ddp: bool = False, accumulate: int = 1, frozen: bool = False):
        self.device, self.amp, self.memory_format = device, amp, _memory_format_of(model)
        self.compiled, self.to_be_cast = compiled, frozen and amp is not None
        if compiled and ddp and getattr(model, "checkpointing", False):
            torch._dynamo.config.optimize_ddp = False        # torch 2.6 cannot split a graph of checkpointed stages
        self.module = self._compile(model) if compiled and not self.to_be_cast else model
        if device.type == "cuda":
            forbid_tf32()                            # for a network that comes without a Diffusion, too
        if ddp:
            # Of the 1x1 kernels in attention, whose two layouts are the same bytes.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            self.module = DistributedDataParallel(
                self.module, device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True, static_graph=accumulate == 1)           # no_sync must not come first then

    def __call__(self, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """x (B, C, H, W), t (B,), the condition by name -> (B, C or 2C, H, W)"""
        x = x.float().contiguous(memory_format=self.memory_format)
        if self.to_be_cast:
            module, self.to_be_cast = cast_once(self.module, self.amp, x, t, condition), False
            self.module = self._compile(module) if self.compiled else module
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            return self.module(x, t, **condition).float()

    def _compile(self, module: nn.Module) -> nn.Module:
        """On a CPU random numbers stay torch's: the compiler's are scalar there, and others than without compiling."""
        return torch.compile(module, options={"fallback_random": True} if self.device.type == "cpu" else None)

    def alone(self) -> "Network":
        """The same without DDP, for calls that are not differentiated: those must not count among its passes."""
        other = copy(self)
        if isinstance(self.module, DistributedDataParallel):
            other.module = self.module.module
        return other

    def gradient_sync(self, now: bool):
        """Context of a backward pass: average the gradients over ranks at its end, or only accumulate them."""
        wait = not now and isinstance(self.module, DistributedDataParallel)
        return self.module.no_sync() if wait else nullcontext()


def _memory_format_of(model: nn.Module) -> torch.memory_format:
    kernels = [p for p in model.parameters() if p.dim() == 4 and not p.is_contiguous()]
    return torch.channels_last if kernels else torch.contiguous_format
