"""Every YAML in configs/: loads, survives saving, builds its network, and says what was published."""

import re

import pytest
import torch

from configs.reading import CONFIG_FOLDER
from configs.schema import load_config, save_config
from models import build_model

SHIPPED = sorted(path.name for path in CONFIG_FOLDER.glob("*.yml"))
M32, M64, M256 = 35_746_307, 78_700_803, 113_673_219        # DDPM's 35.7 M and 114 M; 78.7 M for DDIM's CelebA

# name: (dataset, category, side, parameters, (K, lamda, gamma), per-process batch or None, global batch, epochs,
#        flips, dropout, mu, lr, clip)
PUBLISHED = {
    "cifar10": ("CIFAR10", None, 32, M32, (2, 1.0, 0.0), 32, None, 1200, False, 0.1, 0.9999, 2e-4, 1.0),
    "cifar10_ip": ("CIFAR10", None, 32, M32, (0, 0.0, 0.1), None, 128, 1200, False, 0.1, 0.9999, 2e-4, 1.0),
    "imagenet32": ("IMAGENET32", None, 32, 80_382_723, (0, 0.0, 0.1), None, 512, 400, True, 0.1, 0.9999, 1e-4, 1.0),
    "lsun_tower64": ("LSUN", "tower", 64, M64, (0, 0.0, 0.1), None, 256, 200, True, 0.1, 0.9999, 1e-4, 1.0),
    "ffhq128": ("FOLDER", None, 128, 85_602_691, (0, 0.0, 0.1), None, 128, 1000, True, 0.1, 0.9999, 1e-4, 1.0),
    "celeba": ("CELEBA", None, 64, M64, (2, 1.0, 0.0), 32, None, 1200, True, 0.1, 0.9999, 2e-4, 1.0),
    "celebahq": ("CELEBAHQ", None, 256, M256, (2, 0.1, 0.0), 6, None, 900, False, 0.0, 0.999, 2e-5, None),
    "afhq": ("AFHQ", None, 64, M64, (2, 0.2, 0.0), 32, None, 2000, True, 0.1, 0.9999, 2e-4, 1.0),
    "ffhq64": ("FFHQ64", None, 64, M64, (2, 0.5, 0.0), 64, None, 1500, True, 0.1, 0.9999, 2e-4, 1.0),
    "lsun_church": ("LSUN", "church_outdoor", 256, M256, (2, 1.0, 0.0), None, 64, 10000, True, 0.0, 0.999, 2e-5, None),
    "lsun_bedroom": ("LSUN", "bedroom", 256, M256, (2, 1.0, 0.0), None, 64, 10000, True, 0.0, 0.999, 2e-5, None),
    "church": ("LSUN", "church_outdoor", 256, M256, (0, 0.0, 0.0), None, 64, 10000, True, 0.0, 0.999, 2e-5, None),
    "bedroom": ("LSUN", "bedroom", 256, M256, (0, 0.0, 0.0), None, 64, 10000, True, 0.0, 0.999, 2e-5, None),
}
OURS = ["digits", "digits_cond", "digits_flow", "digits_v", "digits_8x8", "cifar10_tiny", "folder64"]
CONDITIONAL = "cifar10_cond"                                # cifar10 with labels
# name: (side, gamma, global batch, batch of a call, epochs, optimizer, lr, decay, clip, rank, parameters)
TEXT = {
    "sdxl_ip": (1024, 0.1, 4, 1, 50, "Adafactor", 1e-5, 1e-2, 1.0, None, 2_567_463_684),
    "sdxl_lora_ip": (1024, 0.1, 4, 1, 50, "AdamW", 1e-4, 1e-2, 1.0, 8, 2_567_463_684 + 11_612_160),
    "sd15_ip": (512, 0.1, 4, 1, 50, "AdamW", 1e-5, 1e-2, 1.0, None, 859_520_964),
}
FID_STATS = {
    "cifar10": "cifar10_train_stat.npy", "cifar10_ip": "cifar10_train_stat.npy", "celeba": "fid_stats_celeba64.npz",
    "celebahq": "celebahq_stat.npy", "lsun_church": "lsun_church_stat.npy", "church": "lsun_church_stat.npy",
    "ffhq64": "ffhq-64x64.npz", "afhq": "afhqv2-64x64.npz",
}


def parameter_count(config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config).parameters())


def test_the_lists_above_are_complete():
    assert sorted(f"{name}.yml" for name in [*PUBLISHED, *OURS, *TEXT, CONDITIONAL]) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_loads_and_survives_saving(name, tmp_path):
    config = load_config(name)
    save_config(config, tmp_path / "config.yml")
    assert load_config(tmp_path / "config.yml") == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_values(name):
    config = load_config(name)
    loss, training = config.loss, config.training
    assert PUBLISHED[name] == (
        config.data.dataset, config.data.category, config.data.image_size, parameter_count(config),
        (loss.num_consecutive_steps, loss.lamda, loss.input_perturbation),
        None if training.global_batch_size else training.batch_size, training.global_batch_size, training.n_epochs,
        config.data.random_flip, config.model.dropout, config.training.ema[0].rate, config.optim.lr,
        config.optim.grad_clip)
    width = 192 if name == "imagenet32" else 128
    assert (config.model.ch, config.model.num_res_blocks, config.model.attn_resolutions) == (width, 2, (16,))
    schedule = config.diffusion
    assert (schedule.beta_schedule, schedule.beta_start, schedule.beta_end, schedule.num_diffusion_timesteps) == (
        "linear", 1e-4, 0.02, 1000)
    assert config.optim.optimizer == "Adam"


@pytest.mark.parametrize("name", TEXT)
def test_text_to_image_recipes_and_the_size_of_their_networks(name):
    from configs.shapes import SHAPES
    from models.pretrained import shape_of_pretrained

    config = load_config(name)
    training, optim = config.training, config.optim
    network = shape_of_pretrained(config, SHAPES[config.model.pretrained])
    assert TEXT[name] == (
        config.data.image_size, config.loss.input_perturbation, training.global_batch_size, training.micro_batch_size,
        training.n_epochs, optim.optimizer, optim.lr, optim.weight_decay, optim.grad_clip, config.model.lora_rank,
        sum(p.numel() for p in network.parameters()))
    assert (training.amp, config.data.random_crop, config.data.random_flip) == ("bf16", True, True)


@pytest.mark.parametrize("name", OURS)
def test_ours_are_small_and_say_that_they_are_not_published(name):
    assert parameter_count(load_config(name)) < (15_000_000 if name == "folder64" else 2_000_000)
    assert "Nothing in it is published" in (CONFIG_FOLDER / f"{name}.yml").read_text().replace("\n# ", " ")


@pytest.mark.parametrize("name", FID_STATS)
def test_reference_statistics_have_the_seeds_names(name):
    assert load_config(name).sampling.fid_stats == FID_STATS[name]


@pytest.mark.parametrize("name", ["cifar10", "lsun_church", "lsun_bedroom"])
def test_unpublished_loss_settings_are_called_so(name):
    line = re.search(r"num_consecutive_steps: 2 .*", (CONFIG_FOLDER / f"{name}.yml").read_text())[0]
    assert "command-line default, not published" in line
