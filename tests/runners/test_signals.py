"""What a signal does to a process that listens; tests/faults/test_resume.py sends them to real runs."""

import os
import signal
from contextlib import suppress

import pytest

from runners.signals import Abandoned, Signals


def test_a_signal_is_noted_and_the_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Signals().listening() as signals:
        assert signals.vote() == 0 and signals.vote(save=True) == Signals.SAVE
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.vote(save=True) == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_can_be_left_out_is_not_begun_once_a_signal_came():
    signals, begun = Signals(), []
    with signals.abandonable():
        begun.append(1)
    signals.signum = 15
    with pytest.raises(Abandoned), suppress(Exception), signals.abandonable():      # it is no broken file to skip
        begun.append(2)
    assert begun == [1]
