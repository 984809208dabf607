"""Archives that stay open: one handle for each process, opened when first used, never pickled."""

import os
from abc import ABC, abstractmethod


class PerProcess(ABC):
    """Base of readers that hold a file open. Subclasses give ``_open()``; readers call ``self.handle``.

    A forked or spawned worker opens its own: handles of LMDB and zip files must not be shared between processes.
    """

    @abstractmethod
    def _open(self):
        """A new handle."""

    @property
    def handle(self):
        handles = self.__dict__.setdefault("_handles", {})       # by process id: the parent's stays, unused, in a fork
        if os.getpid() not in handles:
            handles[os.getpid()] = self._open()
        return handles[os.getpid()]

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_handles"}
