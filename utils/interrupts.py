"""SIGINT and SIGTERM to a script: an exception, or its end with a line."""

import os
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a script as Ctrl-C does."""


@contextmanager
def terminable():
    """In this block the first SIGTERM raises Terminated; the second ends the process. Nothing changes in a thread."""
    def stop(signum, frame):
        signal.signal(signum, signal.SIG_DFL)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def ended_by_signals(script: str):
    """In this block SIGINT and SIGTERM end the process at once, with a line, as SIGKILL would: for what cleans up after
    that anyway. An exception could come while a pool starts its workers, who would wait for one another. Nothing
    changes in a thread."""
    def end(signum, frame):
        line = f"{Path(script).name}: stopped by {signal.Signals(signum).name}\n"
        os.write(2, ("\n" * sys.stderr.isatty() + line).encode())                 # below a bar
        os._exit(128 + signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, end) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler or signal.SIG_DFL)
