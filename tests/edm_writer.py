"""Snapshots and training states in the form in which EDM's programs write them, of our own networks.

The objects of EDM's classes travel as calls of one function with their state; here they are stand-ins that pickle to
the same.
"""

import io
import pickle
import sys
import types

import numpy as np
import torch
from torch import nn


def _reconstruct_persistent_obj(meta):
    raise AssertionError("a persistent object was rebuilt")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
_EVIL_SOURCE = "raise AssertionError('the source text was executed')"


class Persistent:
    """Pickles as an object of EDM's class ``class_name`` with these attributes."""

    def __init__(self, class_name, **attributes):
        self.meta = {"type": "class", "version": 6, "module_src": _EVIL_SOURCE, "class_name": class_name,
                     "state": attributes}

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


def as_module(module: nn.Module, class_name=None, **attributes):
    """Any module of ours with its children, in EDM's form; ModuleDicts stay what they are."""
    children = {name: as_module(child) for name, child in module._modules.items() if child is not None}
    if isinstance(module, nn.ModuleDict):
        holder = nn.ModuleDict()
        holder.__dict__["_modules"] = children
        return holder
    return Persistent(class_name or type(module).__name__, training=False, _parameters=dict(module._parameters),
                      _buffers=dict(module._buffers), _non_persistent_buffers_set=set(), _modules=children,
                      skip_scale=np.sqrt(0.5), **{"_init_args": (), "_init_kwargs": {}, **attributes})


def network(model: nn.Module, class_name: str, init_kwargs: dict, buffers=()):
    """The preconditioner around a network, as ``ema`` of a snapshot has it."""
    return Persistent(class_name, training=False, _parameters={}, _buffers=dict(buffers),
                      _non_persistent_buffers_set=set(), _modules={"model": as_module(model)}, _init_args=(),
                      _init_kwargs=init_kwargs)


class _Modules:
    """EDM's modules, importable while something is written."""

    def __enter__(self):
        for name in ("torch_utils", "torch_utils.persistence"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj

    def __exit__(self, *_):
        for name in ("torch_utils", "torch_utils.persistence"):
            del sys.modules[name]


def dumps(content) -> bytes:
    with _Modules():
        return pickle.dumps(content, protocol=4)


def torch_save(content) -> bytes:
    file = io.BytesIO()
    with _Modules():
        torch.save(content, file)
    return file.getvalue()
