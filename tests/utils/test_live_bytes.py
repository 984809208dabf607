"""Counting the bytes of living tensors."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from utils.live_bytes import LiveBytes

MIB = 2**20


def test_the_peak_and_what_stays():
    before = torch.zeros(3 * MIB, dtype=torch.uint8)
    with LiveBytes() as live:
        first = torch.zeros(8 * MIB, dtype=torch.uint8)           # 8
        before.add_(1)                                            # was there before: no part of it
        second = first + 1                                        # 16, the peak
        view = second[: 4 * MIB]                                  # the same memory
        del first, second                                         # 8, which the view keeps
        assert live.now == 8 * MIB
        del view
        last = torch.zeros(5 * MIB, dtype=torch.uint8)
    assert (live.peak, live.now) == (16 * MIB, 5 * MIB)
    del last
    assert live.now == 0


def test_what_autograd_saves_lives_until_the_backward_pass():
    x = torch.zeros(MIB, requires_grad=True)
    with LiveBytes() as live:
        y = x.exp().exp().exp()                                   # each result is saved: 3 x 4 MiB
        assert live.now == 12 * MIB
        y.sum().backward()
        del y
    assert live.now == x.grad.nbytes and live.peak > 16 * MIB


def test_checkpointing_lowers_the_peak():
    x, blocks, peaks = torch.zeros(MIB, requires_grad=True), [nn.Sequential(nn.Tanh(), nn.Tanh(), nn.Tanh())] * 4, []
    for run in (lambda block, h: block(h), lambda block, h: checkpoint(block, h, use_reentrant=False)):
        with LiveBytes() as live:
            h = x
            for block in blocks:
                h = run(block, h)
            h.sum().backward()
            del h
        peaks.append(live.peak)
    assert peaks[1] < 0.8 * peaks[0]
