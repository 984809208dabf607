"""The sampler's flags, the same for every script, and the settings that they make."""

import argparse
from collections.abc import Iterable

from utils.errors import UserError


def add_sampler_flags(parser: argparse.ArgumentParser, timesteps: str | None) -> None:
    """Flags of ``SamplerSettings``; ``timesteps`` is the default number of steps, None: it depends on the network."""
    told = "" if timesteps else " (default: 1000, with prompts 30)"
    group = parser.add_argument_group("sampler")
    group.add_argument("--timesteps", default=timesteps, metavar="S", help=f"number of steps, ddimN, or 10,15,20{told}")
    group.add_argument("--eta", type=float, default=0.0, help="0 (deterministic) to 1, for generalized")
    group.add_argument("--sample_type", default="generalized", help="generalized (DDIM), ddpm_noisy (ancestral), heun "
                       "or euler (EDM), dpmpp_2m (DPM-Solver++); or a scheduler of diffusers: "
                       "diffusers:UniPCMultistepScheduler")
    group.add_argument("--skip_type", help="uniform, quad, leading, linspace, trailing, respace; or noise levels as "
                       "edm, vp, ve, iddpm space them (default: uniform, or edm for continuous noise levels)")
    for name, what in (("sigma_min", "lowest"), ("sigma_max", "highest")):
        group.add_argument(f"--{name}", type=float, metavar="LEVEL", help=f"{what} noise level of edm, vp, ve, iddpm")
    group.add_argument("--rho", type=float, help="of edm: even steps in sigma^(1/rho) (default: 7)")
    group.add_argument("--var_type", default="fixedlarge", help="variance of ddpm_noisy: fixedlarge, fixedsmall, or "
                       "learned by the network; analytic (also for generalized) with --gamma")
    group.add_argument("--gamma", metavar="FILE", help="of diagnose.py gamma, for --var_type analytic")
    group.add_argument("--eps_scaler", metavar="B or K,B", help="divide the predicted noise by B, or by K i + B")
    group.add_argument("--churn", metavar="S[,MIN,MAX,NOISE]", help="EDM's S_churn, S_min, S_max and S_noise, for heun "
                                                                    "and euler")
    group.add_argument("--dcw", metavar="LOW[,HIGH]", help="move each step away from its estimate of the image, by LOW "
                       "in the low band and HIGH in the others of a Haar transform; LOW,pixel: without transform")
    group.add_argument("--time_shift", metavar="W,CUTOFF[,code[,V0]]", help="while the time is above CUTOFF, take an "
                       "image for one of the time within W/2 that its variance tells; paper (default) or code; V0: "
                       "variance of the data, published as 0")
    group.add_argument("--restart", metavar="N,K,MIN,MAX[,NOISE][;...]", help="at level MIN, K times add noise up to "
                       "MAX and return in N - 1 steps; for generalized, heun and euler")
    group.add_argument("--ode_time", default="linear", help="heun and euler: make steps in the time linear, ve or vp "
                       "of EDM's ablation")
    group.add_argument("--ode_scale", default="none", help="heun and euler: in the scale none or vp")
    group.add_argument("--alpha", type=float, default=1.0, help="heun: part of the step at which it evaluates again "
                       "(0.5: the midpoint's method)")
    group.add_argument("--clip_denoised", action=argparse.BooleanOptionalAction,
                       help="clamp estimates of x0 (default: only for ddpm_noisy)")
    group.add_argument("--classes", "--class", metavar="LIST", help="labels of a class-conditional network: 3, 0-9 "
                       "(gone through by seed), random (from the image's own seed), or none (default: random)")
    group.add_argument("--guidance", type=float, metavar="W", help="classifier-free guidance scale; 1: none")
    group.add_argument("--guidance_interval", metavar="LOW,HIGH", help="noise levels inside which guidance acts")


def sampler_settings(args):
    """``SamplerSettings`` of parsed flags.

    Raises:
        UserError: The first flag that is not possible, what was given and what is allowed.
    """
    from configs.sampling import SamplerSettings

    keys = {name: getattr(args, name) for name in SamplerSettings.model_fields if hasattr(args, name)}
    for name in ("eps_scaler", "churn", "guidance_interval"):
        if keys.get(name) is not None:
            keys[name] = numbers(name, keys[name])
    text = str(keys["timesteps"])
    keys["timesteps"] = int(text) if text.isdigit() and int(text) > 0 else text
    return checked_settings(keys, "--")


def checked_settings(keys: dict, dashes: str = ""):
    """SamplerSettings of these values; ``dashes`` go before a name in the one line of the UserError."""
    from pydantic import ValidationError

    from configs.sampling import SamplerSettings

    try:
        return SamplerSettings.model_validate(keys)
    except ValidationError as error:
        raise UserError(f"{dashes}{one_line(error, SamplerSettings.model_fields)}") from None


def numbers(name: str, text: str) -> float | tuple[float, ...]:
    """``"1.017"`` or ``"0.001,1.01"`` as numbers; a single one alone only where the key takes one."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--{name} {text!r} is not a list of numbers such as {EXAMPLES[name]}") from None
    return found[0] if len(found) == 1 and name == "eps_scaler" else found


EXAMPLES = {"eps_scaler": "1.017 or 0.0005,1.01", "churn": "40 or 40,0.05,50,1.003", "guidance_interval": "0.2,5",
            "timesteps": "50, 'ddim25' or '10,15,20'", "dcw": "0.05, 0.05,0.01 or 0.05,pixel",
            "time_shift": "40,300 or 40,300,code",
            "restart": "3,2,0.14,0.3 or 3,2,0.14,0.3,1.003;3,1,5,9"}


def one_line(error, known: Iterable[str]) -> str:
    """The first problem of a pydantic ValidationError about SamplerSettings."""
    problem = error.errors(include_url=False)[0]
    flag = f"{problem['loc'][0]} " if problem["loc"] else ""
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "extra_forbidden":
        return f"{flag}is no setting of a sampler; known: {', '.join(known)}"
    example = EXAMPLES.get(problem["loc"][0]) if problem["loc"] else None
    given = flag_text(problem["input"]) if isinstance(problem["input"], tuple) else repr(problem["input"])
    what = "too few numbers" if problem["type"] == "missing" else problem["msg"][0].lower() + problem["msg"][1:]
    return f"{flag}{given}: {what}" + (f"; such as {example}" if example else "")


def flag_text(value) -> str:
    """What follows a flag: numbers by commas, intervals by semicolons."""
    if not isinstance(value, (tuple, list)):
        return str(value)
    nested = any(isinstance(part, (tuple, list)) for part in value)
    return (";" if nested else ",").join(map(flag_text, value))
