"""EDM's settings: every shipped file has the published values, and what cannot be is a line."""

import pytest
import torch

from configs.reading import CONFIG_FOLDER
from configs.schema import Config, load_config, save_config
from models import build_model
from tests.edm_cases import shared, stored
from utils.errors import ConfigError

SHIPPED = sorted(f"edm/{path.name}" for path in (CONFIG_FOLDER / "edm").glob("*.yml"))

# name: (published network of these names and shapes, preconditioner, draw, batch, lr, dropout, augmentation, half-life)
PUBLISHED = {
    "cifar10_ddpmpp": (None, "edm", "lognormal", 512, 1e-3, 0.13, 0.12, 500_000),
    "cifar10_ddpmpp_cond": ("cifar10-32x32-cond-vp", "edm", "lognormal", 512, 1e-3, 0.13, 0.12, 500_000),
    "cifar10_ncsnpp": ("cifar10-32x32-uncond-ve", "edm", "lognormal", 512, 1e-3, 0.13, 0.12, 500_000),
    "cifar10_ddpmpp_vp": (None, "vp", "vp", 512, 1e-3, 0.13, 0.12, 500_000),
    "cifar10_ncsnpp_ve": ("cifar10-32x32-uncond-ve", "ve", "ve", 512, 1e-3, 0.13, 0.12, 500_000),
    "ffhq64": ("ffhq-64x64-uncond-vp", "edm", "lognormal", 256, 2e-4, 0.05, 0.15, 500_000),
    "afhqv2_64": ("ffhq-64x64-uncond-vp", "edm", "lognormal", 256, 2e-4, 0.25, 0.15, 500_000),
    "imagenet64_adm": ("imagenet-64x64-cond-adm", "edm", "lognormal", 4096, 1e-4, 0.10, 0.0, 50_000_000),
}


def test_the_list_above_is_complete():
    assert SHIPPED == sorted(f"edm/{name}.yml" for name in PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_values(name, tmp_path):
    config = load_config(f"edm/{name}")
    network, prediction, draw, batch, lr, dropout, augment, half_life = PUBLISHED[name]
    training = config.training
    assert (config.diffusion.prediction, training.time_sampler, training.global_batch_size, config.optim.lr,
            config.model.dropout, config.data.augment, training.ema[0].half_life) == (
        prediction, draw, batch, lr, dropout, augment, half_life)
    assert training.total_images == (2_500_000_000 if "imagenet" in name else 200_000_000)
    assert config.optim.warmup_images == 10_000_000 and not config.data.random_flip
    assert (config.loss.lamda, config.loss.reduce, config.optim.optimizer) == (0, "sum", "Adam")
    save_config(config, tmp_path / "config.yml")
    assert load_config(tmp_path / "config.yml") == config
    with torch.device("meta"):
        shapes = {f"model.{key}": list(value.shape) for key, value in build_model(config).state_dict().items()}
    for case in (*stored("misc"), *shared("misc")):
        if case["kind"] == "preset" and case["name"] == network:
            assert shapes == case["shapes"]


def make(**sections):
    raw = {"data": {"dataset": "ZIP", "image_size": 16}, "model": {"arch": "songunet", "model_channels": 32}}
    return Config(**{name: raw.get(name, {}) | keys for name, keys in {**raw, **sections}.items()})


def test_the_output_has_twice_the_channels_for_iddpm_only():
    channels = {name: build_model(make(diffusion={"schedule": "sigma", "prediction": name})).out_channels
                for name in ("edm", "vp", "iddpm", "epsilon")}
    assert channels == {"edm": 3, "vp": 3, "iddpm": 6, "epsilon": 3}


def test_numbers_of_images_are_read_with_their_units():
    training = {"total_images": "8Mi", "ema": [{"half_life": "500k"}]}
    config = make(training=training, optim={"warmup_images": "1.5M"})
    assert (config.training.total_images, config.training.ema[0].half_life, config.optim.warmup_images) == (
        8 * 2**20, 500_000, 1_500_000)


@pytest.mark.parametrize("sections, message", [
    ({"data": {"augment": 0.1}}, "data.augment 0.1 needs a network that is told of it"),
    ({"data": {"augment": 0.1}, "model": {"augment_dim": 3}}, "with model.augment_dim 9"),
    ({"model": {"model_channels": 30}}, "model.model_channels 30 must be a multiple of 4"),
    ({"model": {"in_channels": 1}}, "model.in_channels 1 must equal data.channels 3"),
    ({"model": {"resample_filter": [1, 2, 1]}}, "an even number, such as"),
    ({"model": {"channel_mult": [1] * 6}}, "data.image_size 16 cannot be halved 5 times for model.channel_mult"),
    ({"diffusion": {"schedule": "flow", "prediction": "edm"}}, "prediction edm gives no image from pure noise"),
    ({"diffusion": {"prediction": "vp", "sigma_data": 1.0}}, "sigma_data 1.0 is for diffusion.prediction edm, not for"),
    ({"diffusion": {"prediction": "edm", "rescale_timesteps": True}}, "they are told noise levels"),
    ({"training": {"label_dropout": 0.1}}, "or label_dim of EDM's networks"),
    ({"training": {"total_images": "8Q"}}, "a whole number of images, .*units: k, M, G, Ki, Mi, Gi.*, given '8Q'"),
    ({"training": {"total_images": "1.5"}}, "given '1.5'"),
    ({"training": {"ema": [{"length": 0.1, "warmup": True}]}}, "warmup is for rate, not for length; leave it out"),
    ({"training": {"ema": [{"rate": 0.9, "ramp_up": 0.1}]}}, "ramp_up is for half_life, not for rate; leave it out"),
    ({"training": {"keep_every": 5}}, "give keep_last as well"),
    ({"loss": {"variational": "kl", "reduce": "mean", "lamda": 0, "num_consecutive_steps": 0, "weight": "min_snr"}},
     "takes the place of the loss that weight min_snr weighs"),
    ({"optim": {"warmup_steps": 5, "warmup_images": 5}}, "give one of them"),
])
def test_impossible_settings_are_lines(sections, message):
    with pytest.raises(ValueError, match=message):
        make(**sections)


def test_an_unknown_arch_or_a_key_of_another_is_named(tmp_path):
    file = tmp_path / "c.yml"
    for model, message in (("arch: song", "model.arch 'song' is unknown; known: "),
                           ("arch: songunet\n  ch: 3", "model.ch: unknown key"),
                           ("arch: dhariwal\n  dropot: 0.1", "did you mean model.dropout")):
        file.write_text(f"data:\n  dataset: ZIP\n  image_size: 16\nmodel:\n  {model}\n")
        with pytest.raises(ConfigError, match=message):
            load_config(file)
