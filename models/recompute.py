"""Networks whose stages may be computed a second time instead of being kept."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputing(nn.Module):
    """A network that passes its stages through ``run``.

    Attributes:
        checkpointing: Set to True to recompute each stage in the backward pass instead of keeping its activations:
            the same gradients in less memory, for about a third more time.
    """

    checkpointing = False

    def run(self, stage, *args):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, *args, use_reentrant=False)
        return stage(*args)
