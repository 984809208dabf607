"""Draw docs/method.png and docs/gain.png, in closed form on Gaussian data: what a small error does along a chain, what
mends it, and that epsilon scaling and DCW turn the same knob.

    python docs/method_figure.py
"""

import sys
from math import sqrt
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from functions.chain import Chain  # noqa: E402
from functions.denoiser import Denoiser  # noqa: E402
from functions.denoising import generalized_steps  # noqa: E402
from functions.exposure import accumulated_gaps  # noqa: E402
from functions.ode import euler_steps  # noqa: E402
from functions.remedies import DCW  # noqa: E402
from functions.schedule import DiscreteSchedule, SigmaSchedule  # noqa: E402
from functions.timesteps import sampling_times  # noqa: E402
from runners.diagnosis.curves import Curve, Panel, write_figure  # noqa: E402

VARIANCE, ERROR, GAMMA, STEPS = 0.25, 0.02, 0.1, 100
SCHEDULE = DiscreteSchedule(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
TIMES = sampling_times(SCHEDULE, STEPS)


def q_variance(t: int) -> float:
    """Of x_t for images from N(0, VARIANCE I)."""
    return SCHEDULE.alpha(t) ** 2 * VARIANCE + SCHEDULE.sigma(t) ** 2


def excess(factor: float, eps_scaler: float | None = None) -> list[float]:
    """Var_chain / Var_q - 1 at each step of a DDIM chain whose network predicts ``factor`` times the exact noise.

    Such a chain is linear: it multiplies its start, here one standard deviation, by a known number.
    """
    def network(x, t):
        t = int(t[0])
        return factor * SCHEDULE.sigma(t) / q_variance(t) * x

    inputs = {}
    start = torch.full((1, 1, 1, 1), sqrt(q_variance(TIMES[-1])), dtype=torch.float64)
    generalized_steps(Denoiser(network, SCHEDULE), start, TIMES, eps_scaler=eps_scaler,
                      callback=lambda index, t, x, x0, eps: inputs.update({t: x.item() ** 2 / q_variance(t) - 1}))
    return [inputs[t] for t in TIMES]


def gap(sign) -> list[float]:
    """|G_t| of SA-DPM's recursion for errors d_t = sign(t) * ERROR."""
    gaps = {t: torch.tensor([ERROR * sign(index)], dtype=torch.float64) for index, t in enumerate(TIMES)}
    total = accumulated_gaps(SCHEDULE, TIMES, gaps)
    return [total[t].abs().item() for t in TIMES[:-1]]


LEVELS = SigmaSchedule()
LIST = sampling_times(LEVELS, 18)


def chain_on_levels(factor: float, eps_scaler=None, remedies=()) -> tuple[list[float], list[float]]:
    """Of an Euler chain on EDM's levels whose network predicts ``factor`` times the exact noise, at each level of the
    list but the highest: the gain g of the step to it, y_j = x_0' + g level_j e, and Var_chain / Var_q - 1."""
    denoiser, inputs = Denoiser(lambda x, t: factor * t.view(-1, 1, 1, 1) / (VARIANCE + t.view(-1, 1, 1, 1)**2) * x,
                                LEVELS), {}
    start = torch.full((1, 1, 1, 1), sqrt(VARIANCE + LIST[-1] ** 2), dtype=torch.float64)
    euler_steps(denoiser, start, LIST, eps_scaler=eps_scaler, remedies=remedies,
                callback=lambda index, t, x, x0, eps: inputs.update({t: x}))
    gains, excesses = [], []
    for link in Chain(denoiser, LIST).links():
        if not link.last:
            x0, e, _ = denoiser(inputs[link.i], link.i)
            gains.append(((inputs[link.j] - x0) / (link.j * e)).item())
            excesses.append(inputs[link.j].item() ** 2 / (VARIANCE + link.j**2) - 1)
    return gains, excesses


def fitted(options) -> float:
    """The number with which ``options(number)`` gives the chain the variance of the data at its lowest level."""
    low, high = 0.0, 0.2
    for _ in range(40):
        middle = (low + high) / 2
        too_little = chain_on_levels(1 + ERROR, **options(middle))[1][-1] < 0
        low, high = (middle, high) if too_little else (low, middle)
    return low


def draw_gain(path: Path) -> None:
    def scaling(number):
        return {"eps_scaler": 1 + number}

    def dcw(number):
        return {"remedies": [DCW(number, pixel=True)]}

    scaler, strength = fitted(scaling), fitted(dcw)
    cases = {"plain": {}, f"eps / {1 + scaler:.3f}": scaling(scaler), f"DCW {strength:.3f}, pixel": dcw(strength),
             "both at once": scaling(scaler) | dcw(strength)}
    gains, excesses, below = [], [], LIST[-2::-1]
    for colour, (label, options) in enumerate(cases.items()):
        gain, excess = chain_on_levels(1 + ERROR, **options)
        gains.append(Curve(label, below, gain, None, colour))
        excesses.append(Curve(label, below, excess, None, colour))
    write_figure(f"EDM's levels, Euler with 18 steps, Gaussian data of variance {VARIANCE:g}, eps too large by "
                 f"{ERROR:.0%}", [Panel(r"gain $g$ of the step to level $\sigma_j$", gains, 1.0),
                                 Panel(r"Var$_{chain}$ / Var$_q$ - 1", excesses, 0.0)], path, log_time=True)


def main() -> None:
    draw_gain(Path(__file__).with_name("gain.png"))
    perturbed = [GAMMA**2 * SCHEDULE.sigma(t) ** 2 / q_variance(t) for t in TIMES]
    drift = Panel(r"Var$_{chain}(x_t)$ / Var$_q(x_t)$ - 1", [
        Curve("exact network", TIMES, excess(1.0), colour=6),
        Curve(f"eps too large by {ERROR:.0%}", TIMES, excess(1 + ERROR), colour=1),
        Curve(f"the same, divided by {1 + ERROR:g}", TIMES, excess(1 + ERROR, 1 + ERROR), colour=2, style=1),
        Curve(f"inputs in training with gamma = {GAMMA:g}", TIMES, perturbed, colour=0, style=2)], 0.0)
    same = Panel(r"accumulated gap $|G_t|$", [
        Curve("errors that point the same way", TIMES[:-1], gap(lambda index: 1), colour=1),
        Curve("neighbours that cancel", TIMES[:-1], gap(lambda index: (-1) ** index), colour=2)])
    path = Path(__file__).with_name("method.png")
    write_figure(f"Gaussian data of variance {VARIANCE:g}, DDIM with {STEPS} steps (left), errors of size {ERROR:g} "
                 "(right)", [drift, same], path)
    for each in (path, path.with_name("gain.png")):
        Image.open(each).convert("RGB").quantize(256).save(each, optimize=True)          # half the bytes


if __name__ == "__main__":
    main()
