"""Float32 that is float32, whatever whoever calls has allowed: TF32, or bfloat16 products on a CPU."""

from contextlib import contextmanager

import torch
from torch import Tensor

# What decides from torch 2.9 on, beside the older flags. These are kept in step, for torch refuses to read them where
# the two contradict each other.
SWITCHES = [switch for backend in ("cuda", "cudnn", "mkldnn") for operation in ("matmul", "conv", "rnn")
            if hasattr(switch := getattr(getattr(torch.backends, backend), operation, None), "fp32_precision")]


def forbid_tf32() -> None:
    """From here on no TF32, neither in products nor in convolutions."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for switch in SWITCHES:
        switch.fp32_precision = "ieee"


@contextmanager
def full_precision(device: torch.device):
    """fp32 inside: no autocast, no TF32, and kernels that do not depend on what is fastest today."""
    products, convolutions = _flag(torch.get_float32_matmul_precision), _flag(lambda: torch.backends.cudnn.allow_tf32)
    before, benchmark = [switch.fp32_precision for switch in SWITCHES], torch.backends.cudnn.benchmark
    forbid_tf32()
    torch.backends.cudnn.benchmark = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            torch.backends.cudnn.allow_tf32 = convolutions
        for switch, precision in zip(SWITCHES, before, strict=True):
            switch.fp32_precision = precision


def without_autocast(x: Tensor) -> torch.autocast:
    """Context, on the device of x, for what half precision has too few bits for: neighbouring steps would be one."""
    return torch.autocast(x.device.type, enabled=False)


def _flag(read):
    """An older flag, or None where a newer one contradicts it."""
    try:
        return read()
    except RuntimeError:
        return None
