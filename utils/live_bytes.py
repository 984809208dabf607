"""How much memory tensors take, counted while they live."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Inside ``with LiveBytes() as live:`` counts the storages that operations make, until they are freed.

    What an operation allocates and frees within itself is not seen.

    Attributes:
        now: Bytes that live.
        peak: The most so far.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()                  # storages, among them those of before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._known[value.untyped_storage()] = True
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.untyped_storage() not in self._known:
                self._add(value.untyped_storage())
        return result

    def _add(self, storage) -> None:
        size = storage.nbytes()
        self._known[storage] = True
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.now -= size
