"""Deterministic samplers: the probability flow of a DDPM network, integrated in EDM's variables, and run backwards.

Notation (EDM, 2206.00364; abar, e, x0', sigma_t as in ``functions.chain``):

    y        = x / sqrt(abar_t)                the image at noise level sigma_t: y = x_0 + sigma_t n
    D(y)     = x0'                             the denoiser
    dy/dsigma = (y - D(y)) / sigma = e         eq. 1 and 3 with sigma(t) = t

The network knows integer times only, so every level a sampler visits is some sigma_t.
"""

from collections.abc import Sequence
from math import inf, log, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from functions.chain import chain, direction, draw, estimate, nearest_time, sigma


class Churn(NamedTuple):
    """EDM's stochasticity (algorithm 2): each step with s_min <= sigma <= s_max first adds fresh noise."""

    s_churn: float = 0.0           # over all steps: gamma = min(s_churn / S, sqrt(2) - 1) for each
    s_min: float = 0.0
    s_max: float = inf
    s_noise: float = 1.0           # standard deviation of the fresh noise


def move(schedule, x: Tensor, e: Tensor, i: int, j: int) -> Tensor:
    """Follow the tangent ``e`` from time i to time j, up or down: y_j = y_i + (sigma_j - sigma_i) e (EDM, alg. 1)."""
    y = x / sqrt(schedule.exact_alpha_bar(i)) + (sigma(schedule, j) - sigma(schedule, i)) * e
    return sqrt(schedule.exact_alpha_bar(j)) * y


def check_churn(churn) -> Churn:
    """None, s_churn or up to (s_churn, s_min, s_max, s_noise) as Churn.

    Raises:
        ValueError: A negative number, an empty range, or more than four.
    """
    given = () if churn is None else (churn,) if isinstance(churn, (int, float)) else tuple(churn)
    if len(given) > len(Churn._fields):
        raise ValueError(f"churn {churn} has more than the 4 numbers {', '.join(Churn._fields)}")
    churn = Churn(*given)
    if not all(value >= 0 for value in churn) or churn.s_min > churn.s_max:
        raise ValueError(f"churn {tuple(churn)}: all must be at least 0, and s_min at most s_max")
    return churn


def add_churn(schedule, x: Tensor, i: int, num_steps: int, churn: Churn, noise_fn, index: int) -> tuple[Tensor, int]:
    """Raise x from time i to the integer time nearest to EDM's sigma_hat (algorithm 2, lines 4 to 6).

        sigma_hat = sigma (1 + gamma),  y <- y + sqrt(sigma_hat^2 - sigma^2) s_noise z

    Returns:
        x at its new time, and that time; unchanged, and nothing drawn, where the nearest time is i itself.
    """
    level = sigma(schedule, i)
    gamma = min(churn.s_churn / num_steps, sqrt(2) - 1) if churn.s_min <= level <= churn.s_max else 0.0
    raised = nearest_time(schedule, level * (1 + gamma)) if gamma else i
    if raised == i:
        return x, i
    spread = churn.s_noise * sqrt(sigma(schedule, raised)**2 - level**2)
    y = x / sqrt(schedule.exact_alpha_bar(i)) + spread * draw(noise_fn, index)
    return sqrt(schedule.exact_alpha_bar(raised)) * y, raised


@torch.no_grad()
def heun_steps(model, schedule, x: Tensor, timesteps: Sequence[int], *, churn=None, eps_scaler=None,
               clip_denoised: bool = False, noise_fn=None, callback=None, corrector: bool = True) -> Tensor:
    """EDM's second-order sampler (2206.00364, algorithms 1 and 2); 2S - 1 network calls for S steps.

    An Euler step is taken, the tangent at its end evaluated, and the step repeated along the mean of both. The last
    step, to sigma = 0, is Euler's alone.

    Args:
        churn: None, s_churn, or the leading ones of (s_churn, s_min, s_max, s_noise); see ``Churn``. The raised noise
            level snaps to an integer time.
        eps_scaler: As elsewhere; every evaluation is divided by the lambda of its noise level, the corrector included.
        noise_fn: Called once for each step that churn raises.
        callback: Called once for each step, with its first evaluation.
        corrector: False leaves out the second evaluation, which is Euler's method.

    The other arguments, the result and the errors are those of ``functions.denoising.generalized_steps``.
    """
    churn, links = check_churn(churn), list(chain(schedule, timesteps, eps_scaler))
    lower_scales = [scale for *_, scale in links[1:]] + [None]
    for (index, i, j, scale), lower_scale in zip(links, lower_scales, strict=True):
        x, t = add_churn(schedule, x, i, len(links), churn, noise_fn, index)
        eps, x0, e = estimate(model, schedule, x, t, scale, clip_denoised)
        if callback:
            callback(index, t, x, x0, eps)
        ahead = move(schedule, x, e, t, j)
        if corrector and j >= 0:
            _, _, e_ahead = estimate(model, schedule, ahead, j, lower_scale, clip_denoised)
            ahead = move(schedule, x, (e + e_ahead) / 2, t, j)
        x = ahead
    return x


def euler_steps(model, schedule, x: Tensor, timesteps: Sequence[int], *, churn=None, eps_scaler=None,
                clip_denoised: bool = False, noise_fn=None, callback=None) -> Tensor:
    """EDM's sampler without the corrector; without churn it is DDIM with eta = 0.

    Arguments, result and errors are those of ``heun_steps``.
    """
    return heun_steps(model, schedule, x, timesteps, churn=churn, eps_scaler=eps_scaler, clip_denoised=clip_denoised,
                      noise_fn=noise_fn, callback=callback, corrector=False)


@torch.no_grad()
def dpmpp_2m_steps(model, schedule, x: Tensor, timesteps: Sequence[int], *, eps_scaler=None,
                   clip_denoised: bool = False, noise_fn=None, callback=None) -> Tensor:
    """DPM-Solver++(2M) (2211.01095, algorithm 2): second order at one network call for each step.

    With h = log(sigma_i / sigma_j) and h' the same of the step before, the denoiser is extrapolated to half the step,

        D = x0'_i + h / (2 h') (x0'_i - x0'_{i before}),   y_j = D + (sigma_j / sigma_i) (y_i - D),

    where the second part is Euler's step along (y_i - D) / sigma_i. The first and the last step are of first order.

    Arguments (``noise_fn`` is never called), result and errors are those of ``functions.denoising.generalized_steps``.
    """
    before = h_before = None
    for index, i, j, scale in chain(schedule, timesteps, eps_scaler):
        eps, x0, e = estimate(model, schedule, x, i, scale, clip_denoised)
        if callback:
            callback(index, i, x, x0, eps)
        h = log(sigma(schedule, i) / sigma(schedule, j)) if j >= 0 else inf
        if before is not None and j >= 0:
            e = direction(schedule, x, x0 + h / (2 * h_before) * (x0 - before), i)
        x = move(schedule, x, e, i, j)
        before, h_before = x0, h
    return x


@torch.no_grad()
def ddim_inversion(model, schedule, x0: Tensor, timesteps: Sequence[int], *, eps_scaler=None) -> Tensor:
    """The latent from which the deterministic chain gives ``x0``: DDIM run upwards (2010.02502, section 4.3 and 5.4).

    Each step follows the tangent at its lower end, so the error falls with 1/S. The network knows no t = -1: the
    tangent at the image itself is taken with the lowest time of the list.

    Args:
        x0: Images in the range of the chain, (B, C, H, W).
        timesteps, eps_scaler: Of the chain that will decode.

    Returns:
        x at the highest time of the list, (B, C, H, W); S network calls.
    """
    links = list(chain(schedule, timesteps, eps_scaler))[::-1]              # from the lowest noise up
    tangents = [links[0], *links[:-1]]                                      # whose time and scale each step uses
    x = x0
    for (_, i, j, _), (_, t, _, scale) in zip(links, tangents, strict=True):
        _, _, e = estimate(model, schedule, x, t, scale, clip_denoised=False)
        x = move(schedule, x, e, j, i)
    return x
