"""Guidance by a classifier of noisy images (guided-diffusion, 2105.05233, section 4); the samplers apply it."""

from collections.abc import Callable

import torch
from torch import Tensor


def classifier_gradient(classifier: Callable, denoiser, labels: Tensor, scale: float) -> Callable:
    """The hook ``gradient`` of ``functions.chain.Chain``.

    Args:
        classifier: (x (B, C, H, W), t (B,)) -> logits (B, classes); t is what the denoiser's network is told.
        denoiser: Denoiser of the chain.
        labels: Long (B,); images with -1 are not guided.
        scale: s.

    Returns:
        (x, t) -> s grad_x log p(label | x, t), (B, C, H, W), in the type of x.
    """
    def gradient(x: Tensor, t) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = classifier(*denoiser.told(x, t)).log_softmax(dim=1)                      # (B, classes)
            chosen = log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0]                     # (B,)
            return scale * torch.autograd.grad(torch.where(labels >= 0, chosen, 0).sum(), x)[0]

    return gradient
