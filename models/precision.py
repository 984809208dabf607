"""What feature networks share: numbers that do not depend on the settings of whoever calls them."""

from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device):
    """fp32 inside: no autocast and no TF32, neither in convolutions nor in products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
