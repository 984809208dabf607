"""Update rules and learning rates by name."""

import math
from collections.abc import Iterable

import torch
from torch import optim
from torch.optim.lr_scheduler import LambdaLR

from configs.schema import Optim

OPTIMIZERS = {
    "Adam": lambda params, o: optim.Adam(params, **_adam(o)),
    "AdamW": lambda params, o: optim.AdamW(params, **_adam(o)),
    "RMSProp": lambda params, o: optim.RMSprop(params, o.lr, eps=o.eps, weight_decay=o.weight_decay),
    "SGD": lambda params, o: optim.SGD(params, o.lr, o.beta1, weight_decay=o.weight_decay),
}

# Factor of the learning rate, for the part p in [0, 1] of the steps after warm-up.
LR_SCHEDULES = {
    "constant": lambda p: 1.0,
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    "linear": lambda p: 1 - p,
}


def _adam(o: Optim) -> dict:
    return {"lr": o.lr, "betas": (o.beta1, o.beta2), "eps": o.eps, "weight_decay": o.weight_decay,
            "amsgrad": o.amsgrad, "fused": True}


def make_optimizer(params: Iterable[torch.nn.Parameter], config: Optim) -> optim.Optimizer:
    return OPTIMIZERS[config.optimizer](list(params), config)


def make_lr_schedule(optimizer: optim.Optimizer, config: Optim, total_steps: int) -> LambdaLR:
    """Linear warm-up from lr / warmup_steps to lr, then ``lr_schedule`` over the rest; step it after every step."""
    decay, warmup = LR_SCHEDULES[config.lr_schedule], config.warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return decay(min(1.0, (step - warmup) / max(1, total_steps - warmup)))

    return LambdaLR(optimizer, factor)
