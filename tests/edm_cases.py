"""Numbers of the published EDM and EDM-ES code: the choice in tests/golden, and all of them where they are at hand."""

from functools import cache

import pytest
import torch

from models.dhariwal import DhariwalUNet
from models.song import SongUNet
from tests.conftest import GOLDEN, SHARED, load_kept

SNAPSHOT = GOLDEN / "edm_snapshot_nosource.pkl"
NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
USUAL = {"EDMPrecond": "DhariwalUNet", "VPPrecond": "SongUNet", "VEPrecond": "SongUNet", "iDDPMPrecond": "DhariwalUNet"}


@cache
def stored(name: str) -> tuple[dict, ...]:
    return tuple(load_kept(f"edm_{name}"))


@cache
def shared(name: str) -> tuple[dict, ...]:
    path = SHARED / "golden" / f"edm_{name}.pt"
    return tuple(torch.load(path, weights_only=True)) if path.exists() else ()


def cases(name: str, kind: str, needs: str | None = None) -> list:
    """Test parameters: the cases of one kind, of those that have the key ``needs``."""
    return [pytest.param(case, id=f"{prefix}{case['name']}")
            for prefix, found in (("", stored(name)), ("shared: ", shared(name))) for case in found
            if case["kind"] == kind and (needs is None or needs in case)]


def one(name: str, kind: str) -> dict:
    (case,) = [case for case in stored(name) if case["kind"] == kind]
    return case


def build(case: dict) -> torch.nn.Module:
    """The bare network of a case, with the weights that it has."""
    given = dict(case["init_kwargs"])
    network = NETWORKS[given.pop("model_type", USUAL[case["class_name"]])]
    channels = given.pop("img_channels")
    for name in ("use_fp16", "sigma_data"):
        given.pop(name, None)
    out = channels * (2 if case["class_name"] == "iDDPMPrecond" else 1)
    model = network(in_channels=channels, out_channels=out, **given)
    if "state_dict" in case:
        model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in case["state_dict"].items()
                               if name.startswith("model.")})
    return model.eval()


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the mean magnitude."""
    return ((value - expected).abs().max() / expected.abs().mean()).item()
