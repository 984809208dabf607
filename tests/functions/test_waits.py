"""Nothing in the hot loops waits for the device: on ``meta``, which has no numbers, reading one raises."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from functions.analytic import Gamma
from functions.augment import Draws, augment
from functions.denoiser import Denoiser
from functions.denoising import SAMPLERS
from functions.guidance import classifier_gradient
from functions.losses import sequence_aware_loss
from functions.remedies import DCW, Restart, TimeShift
from functions.schedule import DiscreteSchedule, FlowSchedule, SigmaSchedule
from runners.conditioning import hide

META = torch.device("meta")
DISCRETE = DiscreteSchedule(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
SCHEDULES = {"discrete": DISCRETE, "sigma": SigmaSchedule(), "flow": FlowSchedule()}
LABELS = torch.zeros(2, dtype=torch.long, device=META)


class Copies(TorchFunctionMode):
    """Counts what goes from the CPU to the device, for which the CPU waits, too."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.device == META:
            self.count += function is torch.tensor or isinstance(args[0], torch.Tensor) and args[0].device != META
        return found


def copies(run) -> int:
    """In the second of two runs, of which the first may make tables."""
    run()
    with Copies() as found:
        run()
    return found.count


def images():
    return torch.empty(2, 1, 8, 8, device=META)


def denoiser(schedule, prediction="v_prediction"):
    return Denoiser(lambda x, t: torch.empty_like(x), schedule, prediction)


RESTART, SHIFT = Restart(((3, 2, 0.3, 1.0, 1.0),)), TimeShift(20, 10)
GAMMA = Gamma([DISCRETE.time(level) for level in (0.05, 1.0, 50.0)], [0.5, 0.7, 0.9])
CHAINS = {                                          # name: (sampler, options)
    **{name: (name, {}) for name in SAMPLERS},
    "scaled": ("generalized", {"eps_scaler": (0.001, 1.0), "eta": 0.5, "clip_denoised": True}),
    "churn": ("heun", {"churn": 20.0}),
    "dcw": ("generalized", {"remedies": [DCW(0.01, 0.01)]}),
    "restart": ("heun", {"remedies": [RESTART], "eps_scaler": (0.001, 1.0)}),
    **{f"{form} time shift of {name}": (name, {"remedies": [TimeShift(20, 10, form)]})
       for name in SAMPLERS for form in ("paper", "code")},
    "gamma": ("generalized", {"gamma": GAMMA}),
    "shift and gamma": ("generalized", {"gamma": GAMMA, "remedies": [SHIFT]}),
    "shift and ancestral gamma": ("ddpm_noisy", {"gamma": GAMMA, "var_type": "analytic", "remedies": [SHIFT]}),
}


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_chains(name, guided):
    chain, (sampler, options) = denoiser(DISCRETE), CHAINS[name]
    times = [DISCRETE.time(level) for level in (0.1, 0.3, 1.0, 5.0)]
    gradient = classifier_gradient(lambda x, t: x.flatten(1), chain, LABELS, 2.0) if guided else None
    assert copies(lambda: SAMPLERS[sampler](chain, images(), times, noise_fn=lambda index: images(), gradient=gradient,
                                            **options)) == 0


def test_a_chain_after_training():
    """Which looks the network's times up by tensors."""
    schedule = DISCRETE.respaced(range(0, 1000, 100))
    schedule.network_time(torch.zeros(2, dtype=torch.long, device=META))
    assert copies(lambda: SAMPLERS["generalized"](denoiser(schedule), images(), [1, 5, 9])) == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["epsilon", "edm", "vp", "ve", "iddpm"])
def test_losses(schedule, prediction):
    schedule, noise = SCHEDULES[schedule], torch.empty(2, 2, 1, 8, 8, device=META)
    t = schedule.at(torch.empty(2, dtype=torch.float64, device=META))
    assert copies(lambda: sequence_aware_loss(denoiser(schedule, prediction), images(), t, noise, weight="min_snr",
                                              input_perturbation=0.1, perturbation_noise=noise)) == 0


def test_times_of_levels_on_a_discrete_schedule():
    assert copies(lambda: DISCRETE.time(torch.empty(2, device=META))) == 0


def test_labels_are_dropped():
    assert copies(lambda: hide({"labels": LABELS}, torch.zeros(2, dtype=torch.bool, device=META), None)) == 0


def test_augmentation():
    class Some(Draws):
        def __init__(self):
            self.given = {"device": META}

    assert copies(lambda: augment(images(), 0.5, Some())) == 0
