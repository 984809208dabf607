"""Files of guided-diffusion, DDPM-IP and ADM-ES: read, told apart, and refused with what contradicts."""

import pytest
import torch
from torch import nn

from models.adm import ADMUNet
from models.adm_classifier import ADMClassifier
from models.formats.adm import read_settings
from models.weights import load_weights
from tests.adm import arguments, cases, label, of_kind
from utils.errors import DataError

SMALL = {"image_size": 16, "in_channels": 3, "num_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 1],
         "attention_resolutions": [8], "resblock_updown": True, "learn_sigma": True}


def make_model(seed=0, **options) -> ADMUNet:
    torch.manual_seed(seed)
    model = ADMUNet(**SMALL | options)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


STATE = make_model(1, num_classes=10).state_dict()


@pytest.mark.parametrize(("name", "kind", "step"), [
    ("ema_0.9999_010000.pt", "ema", 10_000), ("ema_0.99_000000.pt", "ema", 0), ("ema_1e-05_1000000.pt", "ema", 10**6),
    ("model460000.pt", "raw", 460_000), ("64x64_diffusion.pt", "unknown", None), ("ADM-IP.pt", "unknown", None)])
@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("form", ["tensors", "parameters", "half", "ddp"])
def test_reads(name, kind, step, ema, form, tmp_path):
    state = {
        "tensors": STATE, "half": {key: tensor.half() for key, tensor in STATE.items()},
        "parameters": {key: nn.Parameter(tensor) for key, tensor in STATE.items()},            # as its fp32 runs save
        "ddp": {f"module.{key}": tensor for key, tensor in STATE.items()},
    }[form]
    torch.save(state, tmp_path / name)
    model = make_model(2, num_classes=10)
    info = load_weights(model, tmp_path / name, ema=ema)
    assert (info.format, info.kind, info.step, info.epoch) == ("adm", kind, step, None)
    expected = {key: tensor.half().float() for key, tensor in STATE.items()} if form == "half" else STATE
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(("options", "contradiction"), [
    ({"num_classes": 1000}, "num_classes is 10 in the file, 1000 in the configuration"),
    ({}, "num_classes is 10 in the file, 0 in the configuration"),
    ({"num_classes": 10, "num_channels": 64}, "num_channels is 32 in the file, 64 in the configuration"),
    ({"num_classes": 10, "learn_sigma": False}, "learn_sigma is True in the file, False in the configuration"),
    ({"num_classes": 10, "attention_resolutions": [16]},
     "attention_factors is (2,) in the file, (1,) in the configuration"),
    ({"num_classes": 10, "resblock_updown": False}, "resblock_updown is True in the file, False in the configuration"),
    ({"num_classes": 10, "num_res_blocks": 2}, "num_res_blocks is 1 in the file, 2 in the configuration"),
    ({"num_classes": 10, "use_scale_shift_norm": False},
     "use_scale_shift_norm is True in the file, False in the configuration"),
])
def test_a_contradiction_is_one_line_that_names_both(options, contradiction, tmp_path):
    torch.save(STATE, tmp_path / "w.pt")
    with pytest.raises(DataError) as error:
        load_weights(make_model(**options), tmp_path / "w.pt")
    assert str(error.value) == f"{tmp_path / 'w.pt'} (adm): weights of another network: {contradiction}"


def test_of_another_family(tmp_path):
    torch.save(STATE, tmp_path / "w.pt")
    with pytest.raises(DataError, match="weights of another network: 2 missing: bias, weight; .* unexpected"):
        load_weights(nn.Linear(2, 2), tmp_path / "w.pt")


@pytest.mark.parametrize("case", cases("adm_unet"), ids=label)
def test_settings_of_published_state_dicts(case):
    check_settings(read_settings(case["state_dict"]), case["flags"])


@pytest.mark.parametrize("case", of_kind("state_dict_shapes"), ids=label)
def test_settings_of_published_networks(case):
    check_settings(read_settings({name: torch.empty(shape, device="meta") for name, shape in case["shapes"].items()}),
                   case["flags"])


def check_settings(settings: dict, flags: dict):
    expected = arguments(flags)
    size, levels = expected["image_size"], len(expected["channel_mult"])
    factors = sorted({size // side for side in expected["attention_resolutions"]} & {2**i for i in range(levels)})
    assert settings.pop("attention_factors") == tuple(factors)
    assert settings.pop("channel_mult") == tuple(expected["channel_mult"])
    assert settings == {key: expected[key] for key in settings}
    assert settings.keys() >= {"num_channels", "num_res_blocks", "learn_sigma", "num_classes", "use_scale_shift_norm"}
    assert ("resblock_updown" in settings) == (levels > 1)


@pytest.mark.parametrize(("image_size", "depth", "channel_mult"), [
    (64, 4, (1, 2, 3, 4)), (128, 2, (1, 1, 2, 3, 4)), (256, 2, (1, 1, 2, 2, 4, 4)), (512, 2, (0.5, 1, 1, 2, 2, 4, 4))])
def test_settings_of_published_classifiers(image_size, depth, channel_mult):
    with torch.device("meta"):
        classifier = ADMClassifier(image_size=image_size, in_channels=3, num_channels=128, num_res_blocks=depth,
                                   channel_mult=channel_mult, attention_resolutions=(32, 16, 8), resblock_updown=True)
    assert read_settings(classifier.state_dict()) == {
        "num_channels": 128, "in_channels": 3, "num_res_blocks": depth, "channel_mult": channel_mult,
        "attention_factors": (image_size // 32, image_size // 16, image_size // 8), "use_scale_shift_norm": True,
        "resblock_updown": True, "image_size": image_size, "num_outputs": 1000}


@pytest.mark.parametrize("broken", ["output_blocks.0.0.in_layers.0.weight", "out.2.weight", "time_embed.0.weight",
                                    "input_blocks.1.0.out_layers.3.weight"])
def test_a_state_dict_that_does_not_fit_together(broken):
    state = {name: tensor for name, tensor in STATE.items() if name != broken}
    if broken.startswith("output"):
        state["time_embed.0.weight"] = torch.zeros(3)
    with pytest.raises(DataError, match="no ADM network: its tensors do not fit together at "):
        read_settings(state)


def test_a_name_that_claims_a_billion_blocks_takes_no_memory():
    with pytest.raises(DataError, match="no ADM network: its tensors do not fit together at 1,000,000,000 blocks"):
        read_settings({**STATE, "input_blocks.999999999.0.in_layers.0.weight": torch.zeros(1)})
