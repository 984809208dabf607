"""Keys that nothing would read."""

import json

import pytest

from configs.schema import dotted_keys, load_config, validate
from configs.unread import READERS
from utils.errors import ConfigError

# The key that decides -> a value with which the keys beside are read, and one with which they are not, in Configs that
# are possible otherwise.
OTHERS = {"diffusion.schedule": {"discrete": "sigma", "sigma": "discrete", "flow": "discrete"},
          "diffusion.beta_schedule": {"linear": "cosine"}, "data.dataset": {"LSUN": "CIFAR10"},
          "diffusion.prediction": {"edm": "vp", "vp": "edm"},
          "training.time_sampler": {"lognormal": "uniform", "vp": "uniform", "ve": "uniform"},
          "optim.optimizer": {"Adam": "Adafactor"}, "model.arch": {"diffusers": "unet"}}
GIVEN = {"diffusion.timestep_respacing": "50", "data.random_crop": True, "optim.amsgrad": True, "data.variants": 2,
         "diffusion.rungs": 50, "diffusion.zero_terminal_snr": True, "diffusion.rescale_timesteps": True,
         "diffusion.beta_schedule": "quad",
         "diffusion.beta_start": 0.001, "diffusion.beta_end": 0.5, "diffusion.num_diffusion_timesteps": 50,
         "diffusion.betas": (0.01,) * 50, "diffusion.set_alpha_to_one": False, "diffusion.steps_offset": 1,
         "data.category": "tower", "optim.beta1": 0.5, "optim.beta2": 0.5, "data.latent_dtype": "bfloat16"}
CASES = [(decides, values, key) for readers, keys in READERS for decides, values in readers.items() for key in keys]


def config(decides, value, key, given):
    raw = {"data": {"dataset": "ZIP", "image_size": 32}, "model": {"arch": "unet"}, "diffusion": {}, "training": {},
           "optim": {}, "loss": {}}
    if value == "diffusers":
        raw["model"]["pretrained"] = "folder"
    if value == "flow":
        raw["diffusion"]["prediction"] = "flow"
    if key == "diffusion.zero_terminal_snr":
        raw["diffusion"]["prediction"] = "v_prediction"
    for dotted, setting in ((decides, value), (key, given)):
        section, name = dotted.split(".")
        raw[section][name] = setting
    return validate(raw, "C")


@pytest.mark.parametrize("decides, values, key", CASES, ids=[f"{key}-{decides}" for decides, _, key in CASES])
def test_a_key_is_refused_where_nothing_reads_it_and_taken_where_something_does(decides, values, key):
    given, reads = GIVEN.get(key, 2.5), values[0]
    other = OTHERS[decides][reads]
    config(decides, reads, key, given)
    with pytest.raises(ConfigError) as refusal:
        config(decides, other, key, given)
    told = str(refusal.value)
    assert f"{key} {given} is for " in told and f"{decides} {' or '.join(values)}" in told and other in told
    config(decides, other, key, dotted_keys()[key][1])                          # its default is no wish


def test_draws_of_vp_read_its_constants_whatever_the_network_predicts():
    raw = {"data": {"dataset": "ZIP", "image_size": 32}, "model": {"arch": "unet"},
           "diffusion": {"schedule": "sigma", "prediction": "edm", "beta_d": 5.0}, "training": {"time_sampler": "vp"}}
    assert validate(raw, "C").diffusion.beta_d == 5.0


@pytest.mark.parametrize(("key", "value"), [("beta_schedule", "cosine"), ("schedule", "sigma")])
def test_betas_of_a_file_are_passed_over(key, value, tmp_path):
    """digits.yml has a beta_end of its own; older runs of it with another schedule kept that in their config.yml."""
    found = load_config("digits.yml", [f"diffusion.{key}={value}"]).diffusion
    assert found.model_dump(exclude_defaults=True) == {key: value}
    assert load_config("digits.yml").replace(f"diffusion.{key}", value).diffusion == found
    raw = load_config("digits.yml").model_dump(mode="json")
    raw["diffusion"][key] = value
    (tmp_path / "config.yml").write_text(json.dumps(raw))
    assert load_config(tmp_path / "config.yml").diffusion == found


@pytest.mark.parametrize(("key", "value", "message"), [
    ("loss.perturbation_target", "unperturbed", "perturbation_target unperturbed needs input_perturbation"),
    ("data.labels", "folders", "data.labels folders is for data.dataset AFHQ or FFHQ64 or FOLDER or ZIP, not for CIF"),
    ("data.labels", "filenames", "data.labels filenames is for"),
    ("diffusion.beta_end", "0.5", "diffusion.beta_end 0.5 is for diffusion.beta_schedule linear")])
def test_values_that_nothing_reads(key, value, message):
    with pytest.raises(ConfigError, match=message):
        load_config("cifar10.yml", ["diffusion.beta_schedule=cosine", f"{key}={value}"])
    assert load_config("cifar10.yml", ["loss.input_perturbation=0.1", "loss.perturbation_target=noise",
                                       "data.labels=none"])
