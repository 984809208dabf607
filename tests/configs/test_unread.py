"""Keys that nothing would read."""

import pytest

from configs.schema import dotted_keys, validate
from configs.unread import READERS
from utils.errors import ConfigError

# The key that decides -> a value with which the keys beside are read, and one with which they are not, in Configs that
# are possible otherwise.
OTHERS = {"diffusion.schedule": {"discrete": "sigma", "sigma": "discrete", "flow": "discrete"},
          "diffusion.prediction": {"edm": "vp", "vp": "edm"},
          "training.time_sampler": {"lognormal": "uniform", "vp": "uniform"},
          "optim.optimizer": {"Adam": "Adafactor"}, "model.arch": {"diffusers": "unet"}}
GIVEN = {"diffusion.timestep_respacing": "50", "data.random_crop": True, "optim.amsgrad": True, "data.variants": 2,
         "diffusion.rungs": 50, "diffusion.zero_terminal_snr": True, "diffusion.rescale_timesteps": True,
         "optim.beta1": 0.5, "optim.beta2": 0.5, "data.latent_dtype": "bfloat16"}
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
