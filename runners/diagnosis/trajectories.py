"""Sizes of what a network gets and gives at each step: on noised real images ("training") and along its own chains.

Per pixel, each with the standard error of its mean over images:

    eps       ||eps||^2, before scaling: Gamma_t of Analytic-DPM (2201.06503)
    x0        ||x0'||^2, after scaling and clipping
    x/B       ||x||^2 of band B of a Haar transform, x0/B likewise
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from functions.chain import Chain
from functions.exposure import Moments
from functions.spectrum import BANDS, haar, radial_power
from runners import distributed
from runners.diagnosis.measures import TRAINING, Diagnosis, gathered

FRACTIONS = (-1, -0.25, 0, 0.25, 1)                        # of the gap to the neighbours, where M(s, t) is measured
EFFECTIVE = 3                                              # stream of the noise for it


def size(values: Tensor) -> Tensor:
    """Mean square of each image, (B, ...) -> (B,)."""
    return values.flatten(1).square().mean(1)


def sizes(x: Tensor, x0: Tensor, eps: Tensor) -> dict[str, Tensor]:
    """All that is measured in a step, (B,) each."""
    bands = {f"{name}/{band}": size(values) for name, image in (("x", x), ("x0", x0))
             for band, values in haar(image).items()}
    return {"eps": size(eps), "x0": size(x0), **bands}


class Trajectories:
    """Both passes of a Diagnosis, S network calls for each image and as many as its sampler makes. Collective."""

    def __init__(self, diagnosis: Diagnosis):
        self.diagnosis, self.steps = diagnosis, diagnosis.steps
        moments = Moments()
        self._training(moments)
        self._sampling(moments)
        self.moments = gathered(moments.cpu())             # keys: (kind, quantity, time)

    def _record(self, moments: Moments, kind: str) -> Callable:
        """A callback for ``Chain`` that adds the sizes of a step."""
        def visit(index, t, x, x0, eps):
            for quantity, values in sizes(x, x0, eps).items():
                moments.add((kind, quantity, self.steps[-1 - index]), values)
        return visit

    @torch.no_grad()
    def _training(self, moments: Moments) -> None:
        diagnosis, schedule, sampler = self.diagnosis, self.diagnosis.schedule, self.diagnosis.sampler
        settings = sampler.settings
        for places, x0 in diagnosis.real_images("training"):
            moments.add(("training", "data", None), size(x0))
            for radius, values in enumerate(radial_power(x0).unbind(1)):
                moments.add(("training", "radial", radius), values)
            noise = diagnosis.noise(TRAINING, places)
            chain = Chain(sampler.conditioned(diagnosis.condition(places)), self.steps, settings.eps_scaler,
                          settings.clip and sampler.codec.bounded, callback=self._record(moments, "training"))
            for link in chain.links():
                chain.look(schedule.alpha(link.i) * x0 + schedule.sigma(link.i) * noise.randn(x0.shape), link)

    def _sampling(self, moments: Moments) -> None:
        diagnosis, record = self.diagnosis, self._record(moments, "sampling")
        for _, places in tqdm(diagnosis.share, "sampling", unit="batch", leave=False, disable=distributed.rank() > 0):
            sample = diagnosis.sampler.encoded(*diagnosis.latent(places), record)
            for radius, values in enumerate(radial_power(sample).unbind(1)):
                moments.add(("sampling", "radial", radius), values)

    # --------------------------------------------------------------------------------------------------------- tables

    def pair(self, quantity: str, t) -> dict[str, float]:
        """Both means at t with standard errors, and their ratio."""
        row = {}
        for kind in ("training", "sampling"):
            key = kind, quantity, t
            row |= {kind: self.moments.mean(key).item(), f"{kind}_error": self.moments.standard_error(key)}
        a, b = row["training"], row["sampling"]
        return row | {"ratio": b / a, "ratio_error": b / a * float(
            np.hypot(row["training_error"] / a, row["sampling_error"] / b))}

    def gammas(self) -> list[dict]:
        """Gamma_t forward ("training") and along the chain."""
        return [{"t": t, **self.pair("eps", t)} for t in self.steps]

    def energies(self) -> list[dict]:
        """Energy of the estimates x0' forward and along the chain, and of the data."""
        key = "training", "data", None
        data = {"data": self.moments.mean(key).item(), "data_error": self.moments.standard_error(key)}
        return [{"t": t, **self.pair("x0", t), **data} for t in self.steps]

    def spectra(self) -> list[dict]:
        """Energy of x and x0' in each band and step, and of the final images and the data on rings of frequency."""
        bands = [{"quantity": name, "band": band, "t": t, **self.pair(f"{name}/{band}", t)}
                 for name in ("x", "x0") for band in BANDS for t in self.steps]
        radii = [radius for kind, quantity, radius in self.moments.sums if (kind, quantity) == ("training", "radial")]
        return bands + [{"quantity": "image", "band": f"r {radius}", "t": self.diagnosis.schedule.end,
                         **self.pair("radial", radius)} for radius in radii]

    # ------------------------------------------------------------------------------------------------- effective time

    @torch.no_grad()
    def effective_times(self) -> list[dict]:
        """The time at which q(x_t | x_0) gives a network that is told s the ||eps||^2 which the chain gives it at s.

        With M(s, t) = E ||eps(x_t, s)||^2 / d on q(x_t | x_0), measured at five times around s with the same noise and
        linear in t between and beyond them: M(s, effective) = the chain's. Columns: ``effective``, its standard error,
        ``shift`` = effective - s, and ``slope`` = dM/dt there.
        """
        moments, diagnosis = Moments(), self.diagnosis
        around = {s: nearby_times(diagnosis.schedule, self.steps, place) for place, s in enumerate(self.steps)}
        for places, x0 in diagnosis.real_images("effective time"):
            denoiser = diagnosis.sampler.conditioned(diagnosis.condition(places))
            draw = partial(diagnosis.noise(EFFECTIVE, places).randn, x0.shape)
            for s, times in around.items():
                noise = draw()
                for t in times:
                    x = diagnosis.schedule.alpha(t) * x0 + diagnosis.schedule.sigma(t) * noise
                    moments.add((s, t), size(denoiser(x, s).eps))
        moments = gathered(moments.cpu())
        rows = []
        for s, times in around.items():
            values = [moments.mean((s, t)).item() for t in times]
            found, slope = inverted(times, values, self.moments.mean(("sampling", "eps", s)).item())
            error = np.hypot(self.moments.standard_error(("sampling", "eps", s)), moments.standard_error((s, s)))
            rows.append({"t": s, "effective": found, "effective_error": float(error / max(abs(slope), 1e-12)),
                         "shift": found - s, "slope": slope})
        return rows


def nearby_times(schedule, steps: list, place: int) -> list:
    """Ascending times around ``steps[place]``, itself among them, up to its neighbours in the list."""
    s, discrete = steps[place], hasattr(schedule, "num_timesteps")
    up = steps[place + 1] - s if place + 1 < len(steps) else s - steps[place - 1] if place else s / 2
    down = s - steps[place - 1] if place else (up if discrete else s / 2)
    wanted = [s + fraction * (up if fraction > 0 else down) for fraction in FRACTIONS]
    if discrete:
        return sorted({min(max(round(t), 0), schedule.start) for t in wanted})
    highest = max(schedule.start, steps[-1]) if schedule.alpha(schedule.start) else steps[-1]
    return sorted({min(t, highest) for t in wanted if t > schedule.end})


def inverted(times: list, values: list[float], wanted: float) -> tuple[float, float]:
    """Where the line through (times, values) nearest to the middle has the value ``wanted``, and its slope there.

    Beyond the ends the outermost piece goes on.
    """
    if len(times) < 2:
        return float(times[0]), 0.0
    pieces = list(zip(times, times[1:], values, values[1:], strict=False))
    inside = [piece for piece in pieces if min(piece[2:]) <= wanted <= max(piece[2:])]
    outer = pieces[0] if abs(wanted - values[0]) < abs(wanted - values[-1]) else pieces[-1]
    middle = times[len(times) // 2]
    a, b, low, high = min(inside, key=lambda p: abs((p[0] + p[1]) / 2 - middle)) if inside else outer
    slope = (high - low) / (b - a)
    return float(a + (wanted - low) / slope if slope else a), slope
