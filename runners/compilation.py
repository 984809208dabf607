"""Whether torch.compile earns itself back in a request for images: ``--compile auto`` of generate.py.

    saved = share * seconds of all network calls without;  spent = layers * seconds for a layer * shapes of a batch

On a CPU compiling fuses normalisation, activations and casts, a known share of a call; convolutions stay with the same
library. What a call takes is measured with one image at the start, for less than a second where the network allows it.
"""

import logging
import shutil
import time

import torch
from torch import nn

from runners.network import COMPILE_FROM_CALLS, resolve_compile

# Of benchmarks/sample.py on two cores with avx512_bf16, DDPM's CIFAR-10 network: what compiling takes off a call, and
# what it costs for each layer that has weights.
SAVED = {torch.bfloat16: 0.10, None: 0.0}
SECONDS_FOR_A_LAYER = 0.5
SHORT = 0.3                                          # seconds in which calls are measured again
COMPILERS = ("g++", "clang++", "c++")
log = logging.getLogger(__name__)


def resolve_sampling_compile(name: str, diffusion, sampler, images: int, batch_size: int) -> bool:
    """``auto``: on CUDA from COMPILE_FROM_CALLS network calls on, on a CPU where it saves more than it costs.

    Says in the log what it weighed.

    Args:
        name: on, off or auto.
        diffusion: With weights and ``amp``.
        sampler: Of it, not compiled.
        images: This process's share.
        batch_size: Images of a network call.
    """
    if name != "auto" or diffusion.device.type == "cuda":
        return resolve_compile(name, diffusion.device, sampler.calls * (images // batch_size))
    share, calls = SAVED.get(diffusion.amp, 0.0), sampler.calls * images
    hindrances = {
        "on a CPU it saves nothing in float32": not share,
        f"{calls} calls with one image, {COMPILE_FROM_CALLS} at the least pay for it": calls < COMPILE_FROM_CALLS,
        f"no C++ compiler: {', '.join(COMPILERS)}": not any(map(shutil.which, COMPILERS))}
    if any(hindrances.values()):
        log.info("compile auto: off (%s)", next(reason for reason, hinders in hindrances.items() if hinders))
        return False
    shapes = (images >= batch_size) + (images % batch_size > 0)
    spent = SECONDS_FOR_A_LAYER * layers_of(diffusion.model) * shapes
    saved = share * calls * seconds_of_a_call(sampler)
    log.info("compile auto: %s (it would take some %.0f s and save %.0f)", "on" if saved > spent else "off", spent,
             saved)
    return saved > spent


def layers_of(model: nn.Module) -> int:
    """Layers that have weights of their own."""
    return sum(any(True for _ in module.parameters(recurse=False)) for module in model.modules())


@torch.no_grad()
def seconds_of_a_call(sampler) -> float:
    """Of a network call with one image; batches take a little less for each."""
    denoiser = sampler.conditioned(sampler.condition([0]))
    x = torch.zeros(1, *sampler.codec.shape, device=sampler.device)
    seconds = []
    while len(seconds) < 2 or (len(seconds) < 4 and sum(seconds) < SHORT):       # the first also casts weights
        began = time.perf_counter()
        denoiser(x, sampler.times[0])
        seconds.append(time.perf_counter() - began)
    return min(seconds) / (1 + (sampler.settings.guidance not in (None, 1)))
