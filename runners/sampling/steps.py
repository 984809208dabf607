"""What settings make of a schedule: the times of a chain, its remedies, its steps, and how often these call the
network."""

from collections.abc import Callable
from functools import partial
from math import inf

import torch

from configs.sampling import FOREIGN, SamplerSettings, read_by
from functions.denoiser import Denoiser
from functions.denoising import SAMPLERS, network_calls
from functions.flow_forms import FlowForm
from functions.levels import LEVELS, RANGES
from functions.remedies import REMEDIES, Remedy
from functions.rng import SeededNoise
from functions.timesteps import chain_range, sampling_times
from runners.sampling.schedulers import SchedulerChain
from utils.errors import UserError

# Settings that a sampler takes by their own names.
OPTIONS = {"generalized": ["eta"], "ddpm_noisy": ["var_type"], "heun": ["churn"], "euler": ["churn"], "dpmpp_2m": []}


def times_of(settings: SamplerSettings, schedule, prediction) -> list:
    """The times of a chain, ascending. ValueError, UserError: settings that it cannot have."""
    ranged = [key for key in ("sigma_min", "sigma_max", "rho") if getattr(settings, key) is not None]
    fixed = not str(settings.timesteps).isdigit()
    if fixed and (ranged or settings.skip_type not in (None, "respace")):
        raise UserError(f"--timesteps {settings.timesteps} names the steps themselves; it goes with no "
                        f"--{ranged[0] if ranged else f'skip_type {settings.skip_type}'}")
    if settings.sample_type.startswith(FOREIGN):
        if settings.gamma or remedies_of(settings):
            raise UserError("--dcw, --time_shift, --restart and --gamma correct the steps of this program's samplers, "
                            f"not those of --sample_type {settings.sample_type}")
        if ranged:
            raise UserError(f"--{ranged[0]} is of this program's lists of levels, not of --sample_type "
                            f"{settings.sample_type}")
        return SchedulerChain(settings, schedule, prediction).times
    return sampling_times(schedule, settings.timesteps, settings.skip_type, prediction=prediction,
                          sigma_min=settings.sigma_min, sigma_max=settings.sigma_max, rho=settings.rho)


def form_of(settings: SamplerSettings, schedule, prediction, times: list) -> FlowForm | None:
    """The form of the flow in which heun and euler make their steps. ValueError: one that the levels cannot have."""
    spacing = settings.skip_type or schedule.skip_type
    if spacing in LEVELS:
        levels = chain_range(schedule, spacing, prediction, settings.sigma_min, settings.sigma_max)
    else:
        known = [level for level in map(schedule.level, times) if level < inf]       # noise alone is a step of its own,
        levels = (known[0], known[-1]) if known else RANGES["vp"]                    # which needs no form
    return FlowForm.of(settings.ode_time, settings.ode_scale, settings.alpha, levels)


def remedies_of(settings: SamplerSettings) -> list[Remedy]:
    """What the chain is corrected by, in the order in which it acts."""
    makers = {
        "dcw": lambda low, high: REMEDIES["dcw"](low, pixel=True) if high == "pixel" else REMEDIES["dcw"](low, high),
        "time_shift": REMEDIES["time_shift"],
        "restart": lambda *intervals: REMEDIES["restart"](intervals, corrector=settings.sample_type == "heun"),
    }
    return [makers[name](*getattr(settings, name)) for name in REMEDIES if getattr(settings, name)]


def steps_of(settings: SamplerSettings, schedule, prediction, times: list, gamma=None) -> Callable:
    """The sampler's own steps, or a scheduler's: (denoiser, x, noise, **options) -> what is diffused at the end."""
    options = {key: getattr(settings, key) for key in ("eps_scaler", *OPTIONS.get(settings.sample_type, ["eta"]))}
    if settings.sample_type.startswith(FOREIGN):
        return partial(SchedulerChain(settings, schedule, prediction), **options)
    if "ode_time" in read_by(settings.sample_type):
        options["form"] = form_of(settings, schedule, prediction, times)
    if gamma:
        options["gamma"] = gamma
    return lambda denoiser, x, noise, **more: SAMPLERS[settings.sample_type](
        denoiser, x, times, remedies=remedies_of(settings), noise_fn=lambda index: noise.randn(x.shape),
        **options, **more)


def calls_of(settings: SamplerSettings, schedule, prediction, times: list) -> int:
    """Network calls for each image, those of what guides it included."""
    guided = settings.guidance not in (None, 1)
    if guided and settings.guidance_interval:
        steps = steps_of(settings, schedule, prediction, times)
        return count_calls(settings, schedule, prediction,
                           lambda denoiser, x: steps(denoiser, x, SeededNoise([0], "cpu")))
    if settings.sample_type.startswith(FOREIGN):
        return SchedulerChain(settings, schedule, prediction).calls() * (1 + guided)
    extra = sum(remedy.on(schedule, times, prediction.round).calls for remedy in remedies_of(settings))
    return (network_calls(settings.sample_type, len(times), schedule.alpha(times[-1]) == 0) + extra) * (1 + guided)


def count_calls(settings: SamplerSettings, schedule, prediction, walk: Callable) -> int:
    """Network calls of ``walk(denoiser, x)`` under the guidance of the settings, tried with a network that costs
    nothing."""
    seen = []

    def network(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    denoiser = Denoiser(network, schedule, prediction)
    walk(denoiser.guided(denoiser, 1 if settings.guidance is None else settings.guidance, settings.guidance_interval),
         torch.zeros(1, 1, 2, 2, dtype=schedule.state_dtype))
    return len(seen)
