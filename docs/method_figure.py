"""Draw docs/method.png, in closed form on Gaussian data: what a small error does along a chain, and what mends it.

    python docs/method_figure.py
"""

import sys
from math import sqrt
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from functions.denoiser import Denoiser  # noqa: E402
from functions.denoising import generalized_steps  # noqa: E402
from functions.exposure import accumulated_gaps  # noqa: E402
from functions.schedule import DiscreteSchedule  # noqa: E402
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


def main() -> None:
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
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)              # half the bytes


if __name__ == "__main__":
    main()
