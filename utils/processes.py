"""Worker processes that do not outlive whom they work for."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POLL = 0.5                  # seconds


def leave_with(parent: int) -> None:
    """In a worker: leave signals to ``parent``, and end within a second of its death, however it dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch():
        while os.getppid() == parent:
            time.sleep(POLL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave_signals_to_the_trainer(worker: int = 0) -> None:
    """In a DataLoader's worker: what is sent to a whole job, to save and end, must not end it before the last step.

    It ends when it is told to by its DataLoader, or when the trainer is gone.
    """
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)


def kill_workers() -> None:
    """For ``atexit``, where an error has left some: multiprocessing would send them SIGTERM, and wait."""
    for worker in multiprocessing.active_children():
        worker.kill()


def signal_when_orphaned(parent: int, signum: int) -> None:
    """Send this process ``signum`` within a second of the death of ``parent``, which started it, however that dies."""
    def watch():
        while os.getppid() == parent:
            time.sleep(POLL)
        os.kill(os.getpid(), signum)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def removed_if_killed(path: Path) -> Iterator[None]:
    """Remove ``path``, a file or a tree, if this process is killed inside the block; leave it alone otherwise.

    A child of its own session waits for the end of a pipe whose other end only this process and its workers hold.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        _wait_and_remove(reading, path)
    os.close(reading)
    try:
        yield
    finally:
        os.write(writing, b".")
        os.close(writing)
        os.waitpid(child, 0)


def _wait_and_remove(reading: int, path: Path) -> None:
    try:
        os.setsid()                                        # what is meant for the terminal's jobs does not reach it
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):                            # who reads the output of the killed one need not wait for us
            os.dup2(null, stream)
        os.closerange(3, reading)                          # above all the other end of the pipe
        os.closerange(reading + 1, 1 << 16)
        if not os.read(reading, 1):
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
    finally:
        os._exit(0)
