"""What a dry run finds out by counting."""

import torch

from runners.dry_run import _allocated_at_peak

MIB = 2**20


def test_the_peak_of_live_tensors_is_counted():
    kept = torch.empty(3 * MIB, dtype=torch.uint8)                # before: not part of it

    def work():
        nonlocal kept
        first = torch.empty(8 * MIB, dtype=torch.uint8)           # 8
        second = first.repeat(2)                                  # 24, the peak
        del first                                                 # 16
        kept = second[:1].clone()
        del second                                                # 0
        return torch.empty(20 * MIB, dtype=torch.uint8)           # 20

    assert _allocated_at_peak(work) == 24 * MIB
