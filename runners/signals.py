"""Signals to a training run: noted, agreed upon by all ranks, heeded after the step."""

import logging
import os
import signal
from contextlib import contextmanager

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)


class Abandoned(BaseException):
    """A signal came in a block of ``Signals.abandonable``. No ``except Exception`` may take it for a broken file."""


class Signals:
    """Lets all ranks save or stop after the same step once any of them wants to.

    The vote of one step is collected during the next, so nobody waits for it; without ranks it is instant.
    """

    SAVE = 1                                         # smaller than every signal that is listened to

    def __init__(self):
        self.signum, self._leaves = 0, False
        self._pending = None

    def vote(self, save: bool = False) -> int:
        """0, SAVE, or the signal that ends training after this step. Call once per step on every rank."""
        mine = self.signum or (self.SAVE if save else 0)
        if not dist.is_initialized():
            return mine
        decided = 0
        if self._pending:
            work, vote = self._pending
            work.wait()
            decided = int(vote)
        vote = torch.tensor(mine)
        self._pending = dist.all_reduce(vote, dist.ReduceOp.MAX, async_op=True), vote
        return decided

    @contextmanager
    def listening(self):
        """Note the first signal; the second ends the process at once."""
        def handle(signum, frame):
            if self.signum:
                os._exit(128 + signum)
            self.signum = signum
            if log.isEnabledFor(logging.WARNING):    # not through a log, which this may have interrupted
                name = signal.Signals(signum).name
                os.write(2, f"{name}: finishing this step, then saving; once more ends at once\n".encode())
            if self._leaves:
                raise Abandoned

        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield self
            if self._pending:                        # the vote of the last step
                self._pending[0].wait()
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    @contextmanager
    def abandonable(self):
        """What a run that is to end can do without, and takes long: a signal leaves this block, with Abandoned."""
        try:
            self._leaves = True
            if self.signum:
                raise Abandoned
            yield
        finally:
            self._leaves = False
