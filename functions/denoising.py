"""Samplers: from noise x_{T-1} to an image, one network call for each step of a list.

Notation, for a step from i to the next lower j of the list (the last j is -1, abar_{-1} = 1):

    e     = eps(x, i) / lambda_i                          and x0' that follows from it: ``functions.chain``
    z     ~ N(0, I)
"""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from functions.chain import chain, draw, estimate
from functions.ode import dpmpp_2m_steps, euler_steps, heun_steps


@torch.no_grad()
def generalized_steps(model, schedule, x: Tensor, timesteps: Sequence[int], *, eta: float = 0.0, eps_scaler=None,
                      clip_denoised: bool = False, noise_fn=None, callback=None) -> Tensor:
    """DDIM (2010.02502, eq. 12 and 16).

        sigma = eta sqrt((1 - abar_j)/(1 - abar_i)) sqrt(1 - abar_i/abar_j)
        x <- sqrt(abar_j) x0' + sqrt(1 - abar_j - sigma^2) e + sigma z

    Args:
        model: Callable (x (B, C, H, W), t float32 (B,)) -> predicted noise like x.
        schedule: NoiseSchedule.
        x: Start, a draw of N(0, I) for generation, (B, C, H, W).
        timesteps: Ascending, distinct, in [0, T); executed from the last to the first.
        eta: In [0, 1]; 0 is deterministic, 1 has the DDPM posterior variance.
        eps_scaler: None, b, or (k, b): the network output is divided by lambda = k i + b, i = 0 at the lowest noise.
        clip_denoised: Clamp x0' to [-1, 1] and derive e from it again.
        noise_fn: step_index -> standard normal draw like x; called once for each step with sigma > 0.
        callback: Called as (step_index, t, x, x0, eps): network input, estimate used, unscaled network output.

    Returns:
        The sample, (B, C, H, W). Memory does not depend on the number of steps.

    Raises:
        ValueError: eta, timesteps or eps_scaler out of range, or noise needed but ``noise_fn`` None.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} is not in [0, 1]")
    for index, i, j, scale in chain(schedule, timesteps, eps_scaler):
        abar, abar_next = schedule.exact_alpha_bar(i), schedule.exact_alpha_bar(j)
        eps, x0, e = estimate(model, schedule, x, i, scale, clip_denoised)
        if callback:
            callback(index, i, x, x0, eps)
        sigma = eta * sqrt((1 - abar_next) / (1 - abar)) * sqrt(1 - abar / abar_next)
        x = sqrt(abar_next) * x0 + sqrt(1 - abar_next - sigma**2) * e
        if sigma > 0:
            x = x + sigma * draw(noise_fn, index)
    return x


# Share of b = 1 - abar_i/abar_j that is the variance of a step; DDPM section 3.2.
VAR_TYPES = {
    "fixedlarge": lambda abar, abar_next: 1.0,
    "fixedsmall": lambda abar, abar_next: (1 - abar_next) / (1 - abar),
}


@torch.no_grad()
def ddpm_steps(model, schedule, x: Tensor, timesteps: Sequence[int], *, var_type: str = "fixedlarge", eps_scaler=None,
               clip_denoised: bool = True, noise_fn=None, callback=None) -> Tensor:
    """Ancestral sampling (DDPM, 2006.11239, eq. 7 and 11) on any list of steps.

        b    = 1 - abar_i/abar_j
        mean = (sqrt(abar_j) b x0' + sqrt(1 - b) (1 - abar_j) x) / (1 - abar_i)
        x   <- mean + sqrt(variance) z,  no noise on the last step

    Args:
        var_type: ``fixedlarge`` (variance b) or ``fixedsmall`` (b (1 - abar_j)/(1 - abar_i)).
        clip_denoised: Clamp x0' to [-1, 1].
        noise_fn: Called once for each step but the last.

    The other arguments, the result and the errors are those of ``generalized_steps``.
    """
    if var_type not in VAR_TYPES:
        raise ValueError(f"var_type {var_type!r} is unknown; known: {', '.join(sorted(VAR_TYPES))}")
    for index, i, j, scale in chain(schedule, timesteps, eps_scaler):
        abar, abar_next = schedule.exact_alpha_bar(i), schedule.exact_alpha_bar(j)
        b = 1 - abar / abar_next
        eps, x0, _ = estimate(model, schedule, x, i, scale, clip_denoised)
        if callback:
            callback(index, i, x, x0, eps)
        x = (sqrt(abar_next) * b * x0 + sqrt(1 - b) * (1 - abar_next) * x) / (1 - abar)
        if j >= 0:
            x = x + sqrt(b * VAR_TYPES[var_type](abar, abar_next)) * draw(noise_fn, index)
    return x


SAMPLERS = {"generalized": generalized_steps, "ddpm_noisy": ddpm_steps, "heun": heun_steps, "euler": euler_steps,
            "dpmpp_2m": dpmpp_2m_steps}
OPTIONS = {"generalized": {"eta"}, "ddpm_noisy": {"var_type"}, "heun": {"churn"}, "euler": {"churn"},
           "dpmpp_2m": set()}                                               # what each reads beside the common ones


def network_calls(sample_type: str, num_steps: int) -> int:
    """Network calls for each image: Heun's corrector doubles them but for the last step."""
    return 2 * num_steps - 1 if sample_type == "heun" else num_steps
