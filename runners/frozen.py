"""Weights in the type of autocast, cast once for many calls instead of in each call: for sampling."""

from copy import deepcopy
from itertools import chain

import torch
from torch import Tensor, nn

CAST_BY_AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d)


@torch.no_grad()
def cast_once(model: nn.Module, dtype: torch.dtype, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> nn.Module:
    """A copy of ``model`` that holds the weights which autocast casts in the type to which it casts them.

    Autocast keeps what it has cast only for weights with gradients and only until it is left. The copy computes the
    same numbers: each layer that is called under autocast gets what autocast would give it. Layers that are called
    where it is switched off (time embeddings), and weights that are used without calling their layer, stay as they
    are; which those are, a call with one image tells. All that is not cast is shared with ``model``.

    Args:
        model: In eval mode.
        dtype: Of autocast.
        x, t, condition: Arguments of a call, batch first.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    copied, device = deepcopy(model, shared), x.device.type

    def cast(layer: nn.Module, inputs: tuple) -> None:
        if torch.is_autocast_enabled(device):
            for name, value in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, nn.Parameter(value.to(dtype), requires_grad=False))

    layers = [layer for layer in copied.modules() if isinstance(layer, CAST_BY_AUTOCAST)]
    hooks = [layer.register_forward_pre_hook(cast) for layer in layers]
    try:
        with torch.autocast(device, dtype):
            copied(x[:1], t[:1], **{name: rows[:1] for name, rows in condition.items()})
    finally:
        for hook in hooks:
            hook.remove()
    return copied
