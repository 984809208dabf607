"""Update rules and learning rates by name."""

import math
from collections.abc import Iterable

import torch
from torch import optim
from torch.optim.lr_scheduler import LambdaLR

from configs.schema import Config, Optim
from utils.hub import needs_package

OPTIMIZERS = {
    "Adam": lambda params, o: optim.Adam(params, **_adam(o)),
    "AdamW": lambda params, o: optim.AdamW(params, **_adam(o)),
    "Adafactor": lambda params, o: _adafactor(params, o),
    "RMSProp": lambda params, o: optim.RMSprop(params, o.lr, eps=o.eps, weight_decay=o.weight_decay),
    "SGD": lambda params, o: optim.SGD(params, o.lr, o.beta1, weight_decay=o.weight_decay),
}

# What each keeps for a weight of this shape, by name; the shape of a full state's tensors is compared with it.
MOMENTS = {
    "Adam": lambda o, shape: _adam_moments(o, shape),
    "AdamW": lambda o, shape: _adam_moments(o, shape),
    "Adafactor": lambda o, shape: _adafactor_moments(shape),
    "RMSProp": lambda o, shape: {"step": (), "square_avg": shape},
    "SGD": lambda o, shape: {"momentum_buffer": shape},
}
OPTIONAL_MOMENTS = {"SGD": ("momentum_buffer",)}             # None without momentum

# Factor of the learning rate, for the part p in [0, 1] of the steps after warm-up.
LR_SCHEDULES = {
    "constant": lambda p: 1.0,
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    "linear": lambda p: 1 - p,
}


def _adam(o: Optim) -> dict:
    return {"lr": o.lr, "betas": (o.beta1, o.beta2), "eps": o.eps, "weight_decay": o.weight_decay,
            "amsgrad": o.amsgrad, "fused": True}


def _adafactor(params, o: Optim) -> optim.Optimizer:
    """Adafactor (1804.04235) at a constant rate: factored second moments, no first one; decay is decoupled."""
    try:
        from transformers.optimization import Adafactor
    except ImportError as error:
        raise needs_package(error, "optim.optimizer Adafactor") from None
    return Adafactor(params, lr=o.lr, weight_decay=o.weight_decay, scale_parameter=False, relative_step=False)


def _adafactor_moments(shape) -> dict:
    """Means over rows and over columns, of weights that have both."""
    if len(shape) < 2:
        return {"step": (), "RMS": (), "exp_avg_sq": shape}
    return {"step": (), "RMS": (), "exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": (*shape[:-2], shape[-1])}


def _adam_moments(o: Optim, shape) -> dict:
    return {"step": (), "exp_avg": shape, "exp_avg_sq": shape, **({"max_exp_avg_sq": shape} if o.amsgrad else {})}


def fixed_bytes(model: torch.nn.Module, config: Config) -> int:
    """Float32 weights; of what is trained gradients, the optimizer's moments and the averages."""
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = [shape for p in trained for shape in MOMENTS[config.optim.optimizer](config.optim, p.shape).values()]
    return 4 * (sum(p.numel() for p in model.parameters()) + sum(math.prod(shape) for shape in moments if shape)
                + (1 + len(config.training.ema)) * sum(p.numel() for p in trained))


def make_optimizer(params: Iterable[torch.nn.Parameter], config: Optim) -> optim.Optimizer:
    return OPTIMIZERS[config.optimizer](list(params), config)


def make_lr_schedule(optimizer: optim.Optimizer, config: Optim, total_steps: int, global_batch: int = 1) -> LambdaLR:
    """Linear warm-up to lr, then ``lr_schedule`` over the rest; step it after every step.

    By steps it begins at lr / warmup_steps; by images, as EDM has it, with lr n / warmup_images for the n images seen
    before, so that the first step only fills the moments.
    """
    decay, warmup = LR_SCHEDULES[config.lr_schedule], config.warmup_steps
    if config.warmup_images:
        warmup = -(-config.warmup_images // global_batch)

    def factor(step: int) -> float:
        if step < warmup:
            return step * global_batch / config.warmup_images if config.warmup_images else (step + 1) / warmup
        return decay(min(1.0, (step - warmup) / max(1, total_steps - warmup)))

    return LambdaLR(optimizer, factor)
