"""Cases of guided-diffusion's golden numbers, and the networks, schedules and denoisers that they are about."""

from functools import cache

import torch
from torch import Tensor, nn

from functions.betas import BETAS
from functions.denoiser import Denoiser
from functions.schedule import DiscreteSchedule
from models.adm import ADMUNet
from tests.conftest import SHARED, load_kept


@cache
def cases(name: str) -> list[dict]:
    """Those of tests/golden, and what a shared folder beside the repository has more."""
    kept = load_kept(name)
    shared = SHARED / "golden" / f"{name}.pt"
    more = torch.load(shared, weights_only=True) if shared.exists() else []
    whole = {label(case) for case in kept if "outputs" not in case}        # the rest has recorded outputs, no network
    return kept + [case for case in more if label(case) not in whole]


def label(case: dict) -> str:
    """What tells a case from the others of its file."""
    keys = ("name", "kind", "recipe", "noise_schedule", "diffusion_steps", "timestep_respacing")
    return ", ".join(str(case[key]) for key in keys if key in case)


def of_kind(kind: str) -> list[dict]:
    return [case for case in cases("adm_misc") if case["kind"] == kind]


CHANNEL_MULT = {128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)}


def arguments(flags: dict) -> dict:
    """Published flags as the network's arguments."""
    own = dict(flags)
    own["num_classes"] = own["num_classes"] if own.pop("class_cond") else 0
    own["attention_resolutions"] = [int(side) for side in own["attention_resolutions"].split(",")]
    mult = own["channel_mult"]
    own["channel_mult"] = [float(m) for m in mult.split(",")] if mult else CHANNEL_MULT[own["image_size"]]
    return own


def network(case: dict) -> nn.Module:
    """With the case's own copy of the weights: those of a file are views of pools that all cases share."""
    model = ADMUNet(**arguments(case["flags"])).eval()
    model.load_state_dict(case["state_dict"])
    return model


class Playback(nn.Module):
    """A network whose outputs along a chain are known: it says them one after another, and checks the times."""

    def __init__(self, outputs: Tensor, times: list[float]):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.outputs, self.times = list(outputs), list(times)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        assert t.tolist() == [self.times.pop(0)] * len(x)
        return self.outputs.pop(0)


def schedule_of(flags: dict) -> DiscreteSchedule:
    name = {"linear": "adm_linear", "cosine": "cosine"}[flags["noise_schedule"]]
    return DiscreteSchedule(BETAS[name](None, None, flags["diffusion_steps"]))


def denoiser_of(case: dict, model, schedule: DiscreteSchedule) -> Denoiser:
    """By the published flags of the process."""
    flags = case["diffusion"]
    prediction = "sample" if flags["predict_xstart"] else "epsilon"
    condition = {} if case["y"] is None else {"labels": case["y"]}
    factor = 1000 / flags["diffusion_steps"] if flags["rescale_timesteps"] else 1.0
    return Denoiser(model, schedule, prediction, condition, time_factor=factor)


def relative_error(given: Tensor, expected: Tensor) -> float:
    return ((given - expected).abs().max() / expected.abs().mean()).item()
