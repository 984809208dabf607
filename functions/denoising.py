"""Samplers: from noise to an image, one step after another. Each is a rule for one step; ``functions.chain`` loops.

Notation (i, j, e, x0' as in ``functions.chain``): r = level_j / level_i, z ~ N(0, I).

    generalized   x_j = alpha_j x0' + sqrt(sigma_j^2 - s^2) e + s z,   s = eta sigma_j sqrt(1 - r^2)
    ddpm_noisy    x_j = alpha_j x0' + sigma_j r e + sqrt(v) z,         no noise on the last step
    euler         x_j = alpha_j x0' + sigma_j e                        (``functions.ode``)

With analytic variances (``functions.analytic``) generalized draws sqrt(v) z in place of s z.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from functions.analytic import Gamma, analytic_variance
from functions.chain import Chain
from functions.ode import dpmpp_2m_steps, euler_steps, heun_steps
from functions.schedule_base import logarithm, root


def generalized_steps(denoiser, x: Tensor, times: Sequence[float], *, eta: float = 0.0, eps_scaler=None,
                      clip_denoised: bool = False, noise_fn=None, callback=None, gradient=None, remedies=(),
                      gamma: Gamma | None = None, start: float | None = None) -> Tensor:
    """DDIM (2010.02502, eq. 12 and 16).

    Args:
        denoiser: Denoiser.
        x: Start, a draw of N(0, prior_std^2 I) for generation, (B, C, H, W); its type is that of the whole chain.
        times: Ascending, distinct times of the denoiser's schedule; executed from the last to the first.
        eta: In [0, 1]; 0 is deterministic, 1 has the DDPM posterior variance.
        eps_scaler, clip_denoised, callback, gradient, remedies, start: See ``functions.chain.Chain``.
        noise_fn: step_index -> standard normal draw like x; called once for each step with s > 0.
        gamma: Draw analytic variances, on each step but the last.

    Returns:
        The sample, (B, C, H, W). Memory does not depend on the number of steps.

    Raises:
        ValueError: eta, times or eps_scaler out of range, or noise needed but ``noise_fn`` None.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} is not in [0, 1]")
    chain = Chain(denoiser, times, eps_scaler, clip_denoised, noise_fn, callback, gradient, remedies, start)
    schedule = chain.schedule

    def step(x, link):
        x0, e, _ = chain.guide(chain.look(x, link), x, link.i)
        alpha, sigma, r = schedule.alpha(link.j, x.dtype), schedule.sigma(link.j, x.dtype), ratio(schedule, link, x)
        s = eta * sigma * root(1 - r**2)
        mean = alpha * x0 + root(sigma**2 - s**2) * e
        if gamma is not None:
            pixels = gamma.pixels and 1
            return mean if link.last else mean + root(
                analytic_variance(chain, link, gamma, s**2, x, pixels)) * chain.draw(link)
        return mean + s * chain.draw(link) if eta > 0 and (isinstance(s, Tensor) or s > 0) else mean

    return chain.run(x, step)


def ratio(schedule, link, x: Tensor):
    """r of a link."""
    return schedule.level(link.j, x.dtype) / schedule.level(link.i, x.dtype)


def step_variances(schedule, i, j, dtype: torch.dtype = torch.float32) -> tuple:
    """Smallest and largest reasonable variance of the ancestral step from i to j (DDPM, section 3.2): the posterior's
    for data that are a point, and for data that are standard normal."""
    sigma = schedule.sigma(j, dtype)
    small = sigma**2 * (1 - (schedule.level(j, dtype) / schedule.level(i, dtype)) ** 2)
    large = schedule.sigma(i, dtype) ** 2 - (schedule.alpha(i, dtype) / schedule.alpha(j, dtype) * sigma) ** 2
    return small, large


def _small_before_last(chain: Chain) -> float:
    """The smallest variance of the list's step before its last one, wherever a remedy has moved that; of a list of one
    step, the largest of that."""
    if len(chain) == 1:
        return step_variances(chain.schedule, chain.times[0], chain.schedule.end)[1]
    return step_variances(chain.schedule, chain.times[1], chain.times[0])[0]


def _large(chain: Chain, link, estimate, gamma):
    """On the last step, where only a classifier's gradient asks for it, guided-diffusion's: the smallest of the step
    before."""
    if link.last:
        return _small_before_last(chain)
    return step_variances(chain.schedule, link.i, link.j, estimate.x0.dtype)[1]


def _learned(chain: Chain, link, estimate, gamma):
    """Between both on a logarithmic scale (2102.09672, eq. 15); the smaller of the last step is that of the step
    before."""
    if estimate.variance is None:
        raise ValueError("var_type learned: this network gives no variances; use fixedlarge or fixedsmall")
    small, large = step_variances(chain.schedule, link.i, link.j, estimate.x0.dtype)
    if link.last:
        small = _small_before_last(chain)
    small, large = logarithm(small), logarithm(large)
    return torch.exp(estimate.variance * large + (1 - estimate.variance) * small)


def _analytic(chain: Chain, link, estimate, gamma):
    if gamma is None:
        raise ValueError("var_type analytic needs gamma")
    small = step_variances(chain.schedule, link.i, link.j, estimate.x0.dtype)[0]
    return analytic_variance(chain, link, gamma, small, estimate.x0, gamma.pixels)


VAR_TYPES = {                                                        # (chain, link, estimate, gamma) -> variance
    "fixedlarge": _large,
    "fixedsmall": lambda chain, link, estimate, _: step_variances(chain.schedule, link.i, link.j, estimate.x0.dtype)[0],
    "learned": _learned,
    "analytic": _analytic,
}


def ddpm_steps(denoiser, x: Tensor, times: Sequence[float], *, var_type: str = "fixedlarge", eps_scaler=None,
               clip_denoised: bool = True, noise_fn=None, callback=None, gradient=None, remedies=(),
               gamma: Gamma | None = None, start: float | None = None) -> Tensor:
    """Ancestral sampling (DDPM, 2006.11239, eq. 7 and 11) on any list of times.

    Args:
        var_type: Name in ``VAR_TYPES``; ``learned`` needs a network that gives variances, ``analytic`` gamma.
        clip_denoised: Clamp x0' to [-1, 1].
        noise_fn: Called once for each step but the last.
        gradient: A classifier's, which moves the mean by the variance times it.

    The other arguments, the result and the errors are those of ``generalized_steps``.
    """
    if var_type not in VAR_TYPES:
        raise ValueError(f"var_type {var_type!r} is unknown; known: {', '.join(sorted(VAR_TYPES))}")
    chain = Chain(denoiser, times, eps_scaler, clip_denoised, noise_fn, callback, gradient, remedies, start)
    schedule = chain.schedule

    def step(x, link):
        estimate, r = chain.look(x, link), ratio(schedule, link, x)
        mean = schedule.alpha(link.j, x.dtype) * estimate.x0 + schedule.sigma(link.j, x.dtype) * r * estimate.eps
        if link.last and gradient is None:
            return mean
        variance = VAR_TYPES[var_type](chain, link, estimate, gamma)
        if gradient is not None:
            mean = mean + variance * gradient(x, link.i)
        return mean if link.last else mean + variance**0.5 * chain.draw(link)

    return chain.run(x, step)


SAMPLERS = {"generalized": generalized_steps, "ddpm_noisy": ddpm_steps, "heun": heun_steps, "euler": euler_steps,
            "dpmpp_2m": dpmpp_2m_steps}


def network_calls(sample_type: str, num_steps: int, from_noise_alone: bool = False) -> int:
    """Network calls for each image: Heun's corrector doubles them but for the last step, and for the first one of a
    chain that starts where alpha is 0."""
    return 2 * num_steps - 1 - (from_noise_alone and num_steps > 1) if sample_type == "heun" else num_steps
