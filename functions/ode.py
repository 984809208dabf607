"""Deterministic samplers: the probability flow of any denoiser, integrated in EDM's variables, and run backwards.

Notation (EDM, 2206.00364; i, j, e, x0' as in ``functions.chain``):

    y            = x / alpha                  the image at noise level = sigma / alpha: y = x_0 + level n
    D(y)         = x0'                        the denoiser
    dy / dlevel  = (y - D(y)) / level = e     eq. 1 and 3 with sigma(t) = t

Where alpha is 0 (pure noise, level infinite) the first step is Euler's, x_j = alpha_j x0' + sigma_j e: it needs no y.
"""

from collections.abc import Sequence
from math import inf, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from functions.chain import Chain
from functions.schedule_base import logarithm


class Churn(NamedTuple):
    """EDM's stochasticity (algorithm 2): each step with s_min <= level <= s_max first adds fresh noise."""

    s_churn: float = 0.0           # over all steps: gamma = min(s_churn / S, sqrt(2) - 1) for each
    s_min: float = 0.0
    s_max: float = inf
    s_noise: float = 1.0           # standard deviation of the fresh noise


def check_churn(churn) -> Churn:
    """None, s_churn or up to (s_churn, s_min, s_max, s_noise) as Churn.

    Raises:
        ValueError: A negative number, an s_noise that is not finite, an empty range, or more than four.
    """
    given = () if churn is None else (churn,) if isinstance(churn, (int, float)) else tuple(churn)
    if len(given) > len(Churn._fields):
        raise ValueError(f"churn {churn} has more than the 4 numbers {', '.join(Churn._fields)}")
    churn = Churn(*given)
    if not all(value >= 0 for value in churn) or churn.s_min > churn.s_max or churn.s_noise == inf:
        raise ValueError(f"churn {tuple(churn)}: all must be at least 0, s_min at most s_max, and s_noise finite")
    return churn


def move(schedule, x: Tensor, e: Tensor, i, j) -> Tensor:
    """Follow the tangent ``e`` from time i to time j, up or down: y_j = y_i + (level_j - level_i) e (EDM, alg. 1)."""
    y = x / schedule.alpha(i, x.dtype) + (schedule.level(j, x.dtype) - schedule.level(i, x.dtype)) * e
    return schedule.alpha(j, x.dtype) * y


def euler(schedule, x0: Tensor, e: Tensor, j) -> Tensor:
    """The same step from the estimate: x_j = alpha_j x0' + sigma_j e."""
    return schedule.alpha(j, x0.dtype) * x0 + schedule.sigma(j, x0.dtype) * e


def second_order(chain: Chain, x: Tensor, e: Tensor, ahead: Tensor, i, j, scale: float) -> Tensor:
    """Repeat the step from i to j, which ended in ``ahead``, along the mean of e and the tangent there (EDM, alg. 1).

    Args:
        scale: lambda_j.
    """
    e_ahead = chain.guide(chain.estimate(ahead, j, scale), ahead, j).eps
    return move(chain.schedule, x, (e + e_ahead) / 2, i, j)


def add_churn(chain: Chain, x: Tensor, link, churn: Churn) -> tuple[Tensor, float]:
    """Raise x from time i to EDM's sigma_hat, or to the time nearest to it (algorithm 2, lines 4 to 6).

        level_hat = level (1 + gamma),  y <- y + sqrt(level_hat^2 - level^2) s_noise z

    Returns:
        x at its new time, and that time; unchanged, and nothing drawn, where that is i itself.
    """
    if churn.s_churn == 0:
        return x, link.i
    schedule, level = chain.schedule, chain.schedule.level(link.i)
    gamma = min(churn.s_churn / len(chain), sqrt(2) - 1) if churn.s_min <= level <= churn.s_max else 0.0
    if gamma == 0 or level == inf:
        return x, link.i
    raised = schedule.time(chain.denoiser.prediction.round(level * (1 + gamma)))
    if raised == link.i:
        return x, link.i
    spread = churn.s_noise * sqrt(max(0.0, schedule.level(raised) ** 2 - level**2))
    return schedule.alpha(raised) * (x / schedule.alpha(link.i) + spread * chain.draw(link)), raised


def heun_steps(denoiser, x: Tensor, times: Sequence[float], *, churn=None, eps_scaler=None, clip_denoised: bool = False,
               noise_fn=None, callback=None, gradient=None, remedies=(), start=None, form=None,
               corrector: bool = True) -> Tensor:
    """EDM's second-order sampler (2206.00364, algorithms 1 and 2); 2S - 1 network calls for S steps.

    An Euler step is taken, the tangent at its end evaluated, and the step repeated along the mean of both. The last
    step, to level 0, is Euler's alone, and so is one that starts where alpha is 0 and y has no meaning.

    Args:
        churn: None, s_churn, or the leading ones of (s_churn, s_min, s_max, s_noise); see ``Churn``. On a discrete
            schedule the raised noise level snaps to a step.
        eps_scaler: As elsewhere; every evaluation is divided by the lambda of its noise level, the corrector included.
        noise_fn: Called once for each step that churn raises.
        callback: Called once for each step, with its first evaluation.
        form: ``functions.flow_forms.FlowForm``, another form of the flow; None: EDM's, level and y as they are.
        corrector: False leaves out the second evaluation, which is Euler's method.

    The other arguments, the result and the errors are those of ``functions.denoising.generalized_steps``.
    """
    churn = check_churn(churn)
    chain = Chain(denoiser, times, eps_scaler, clip_denoised, noise_fn, callback, gradient, remedies, start)
    schedule = chain.schedule

    def step(x, link):
        x, t = add_churn(chain, x, link, churn)
        x0, e, _ = chain.guide(chain.look(x, link, t), x, t)
        noise_alone = not isinstance(t, Tensor) and schedule.alpha(t) == 0
        two = corrector and not link.last and not noise_alone
        if form is not None and not noise_alone:
            return follow(chain, form, x, e, t, link, two)
        ahead = euler(schedule, x0, e, link.j)
        if not two:
            return ahead
        return second_order(chain, x, e, ahead, t, link.j, link.below)

    return chain.run(x, step)


def follow(chain: Chain, form, x: Tensor, e: Tensor, t, link, two: bool) -> Tensor:
    """A step from time t in another form of the flow; ``two``: with a second evaluation."""
    schedule, lower = chain.schedule, chain.schedule.level(link.j)

    def second(y, level, part):
        time = link.j if level == lower else schedule.time(level)
        x = schedule.alpha(time) * y
        scale = link.scale + part * (link.below - link.scale)
        return chain.guide(chain.estimate(x, time, scale), x, time).eps

    y = form.step(x / schedule.alpha(t), e, schedule.level(t), lower, second if two else None)
    return schedule.alpha(link.j) * y


def euler_steps(denoiser, x: Tensor, times: Sequence[float], *, churn=None, eps_scaler=None,
                clip_denoised: bool = False, noise_fn=None, callback=None, gradient=None, remedies=(), start=None,
                form=None) -> Tensor:
    """EDM's sampler without the corrector; without churn it is DDIM with eta = 0.

    Arguments, result and errors are those of ``heun_steps``.
    """
    return heun_steps(denoiser, x, times, churn=churn, eps_scaler=eps_scaler, clip_denoised=clip_denoised,
                      noise_fn=noise_fn, callback=callback, gradient=gradient, remedies=remedies, start=start,
                      form=form, corrector=False)


def dpmpp_2m_steps(denoiser, x: Tensor, times: Sequence[float], *, eps_scaler=None, clip_denoised: bool = False,
                   noise_fn=None, callback=None, gradient=None, remedies=(), start=None) -> Tensor:
    """DPM-Solver++(2M) (2211.01095, algorithm 2): second order at one network call for each step.

    With h = log(level_i / level_j) and h' the same of the step before, the denoiser is extrapolated to half the step,

        D = x0'_i + h / (2 h') (x0'_i - x0'_{i before}),   y_j = D + (level_j / level_i) (y_i - D),

    where the second part is Euler's step along (y_i - D) / level_i. The first and the last step are of first order.

    Arguments (``noise_fn`` is never called), result and errors are those of ``functions.denoising.generalized_steps``.
    """
    chain = Chain(denoiser, times, eps_scaler, clip_denoised, noise_fn, callback, gradient, remedies, start)
    schedule, before, h_before = chain.schedule, None, inf

    def step(x, link):
        nonlocal before, h_before
        x0, e, _ = chain.guide(chain.look(x, link), x, link.i)
        h = inf if link.last else logarithm(schedule.level(link.i, x.dtype) / schedule.level(link.j, x.dtype))
        used = x0
        if not link.last and (isinstance(h_before, Tensor) or h_before < inf):
            used = x0 + h / (2 * h_before) * (x0 - before)
            e = (x - schedule.alpha(link.i, x.dtype) * used) / schedule.sigma(link.i, x.dtype)
        before, h_before = x0, h
        return euler(schedule, used, e, link.j)

    return chain.run(x, step)


@torch.no_grad()
def ddim_inversion(denoiser, x0: Tensor, times: Sequence[float], *, eps_scaler=None) -> Tensor:
    """The latent from which the deterministic chain gives ``x0``: DDIM run upwards (2010.02502, section 4.3 and 5.4).

    Each step follows the tangent at its lower end, so the error falls with 1/S. The network knows no clean image: the
    tangent there is taken with the lowest time of the list.

    Args:
        x0: Images in the range of the chain, (B, C, H, W).
        times, eps_scaler: Of the chain that will decode; its first time must not be pure noise.

    Returns:
        x at the highest time of the list, (B, C, H, W); S network calls.
    """
    chain = Chain(denoiser, times, eps_scaler)
    links = list(chain.links())[::-1]                                       # from the lowest noise up
    tangents = [links[0], *links[:-1]]                                      # whose time and scale each step uses
    x = x0
    for link, tangent in zip(links, tangents, strict=True):
        e = chain.estimate(x, tangent.i, tangent.scale).eps
        x = move(chain.schedule, x, e, link.j, link.i)
    return x
