"""Settings of a diffusers folder that change what the network computes, against a list of what is known. The weights
are ours under our names, which the renaming leaves alone, so that diffusers itself is not needed."""

import json
import os

import pytest
from safetensors.torch import save_file

from configs.schema import Config
from models import build_model
from models.weights import load_weights
from utils.errors import DataError

DDIMS = {"_class_name": "UNet2DModel", "_diffusers_version": "0.30.0", "flip_sin_to_cos": False, "freq_shift": 1,
         "norm_eps": 1e-6, "downsample_padding": 0, "attention_head_dim": None, "block_out_channels": [32],
         "sample_size": 8, "num_train_timesteps": 1000, "dropout": 0.1}


@pytest.fixture
def load(tmp_path):
    """``load({"norm_eps": 1e-5})`` reads a folder with these settings on top of those of DDIM's network."""
    model = build_model(Config.model_validate({
        "data": {"dataset": "DIGITS", "image_size": 8, "channels": 3},
        "model": {"ch": 32, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [8]}}))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()},
              tmp_path / "diffusion_pytorch_model.safetensors")

    def read(changes):
        (tmp_path / "config.json").write_text(changes if isinstance(changes, str) else json.dumps(DDIMS | changes))
        return load_weights(model, tmp_path)
    return read


@pytest.mark.parametrize("changes", [{}, {"attention_head_dim": 32}, {"attn_norm_num_groups": 32}, {"unknown": None},
                                     {"add_attention": True, "downsample_type": "conv", "_name_or_path": "x"}])
def test_the_same_network_is_read(load, changes):
    assert load(changes).format == "diffusers"


@pytest.mark.parametrize(("changes", "message"), [
    ({"attn_norm_num_groups": 16}, "attn_norm_num_groups is 16, needed None"),
    ({"attention_head_dim": [8]}, r"attention_head_dim is \[8\], needed None"),
    ({"attention_head_dim": {"a": 1}}, "attention_head_dim is {'a': 1}, needed None"),
    ({"add_attention": False}, "add_attention is False, needed True"),
    ({"downsample_type": "resnet"}, "downsample_type is 'resnet', needed 'conv'"),
    ({"num_class_embeds": 10}, "num_class_embeds is 10, needed None"),
    ({"mid_block_type": None}, "mid_block_type is None"),
    ({"skip_scaling": 0.5}, "skip_scaling is 0.5, which is not known here"),
    ("[1]", "config.json: cannot be read"), ("[" * 100_000, "config.json: cannot be read"), ("{", "cannot be read")])
def test_another_network_is_refused(load, changes, message):
    with pytest.raises(DataError, match=message):
        load(changes)


def test_files_that_are_no_files(load, tmp_path):
    load({})
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        os.symlink("/dev/zero", tmp_path / name)
        with pytest.raises(DataError):
            load_weights(None, tmp_path)
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(whole)
