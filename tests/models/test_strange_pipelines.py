"""Pipelines of strangers: nothing in their folders is executed, waited for, or believed to be larger than it is."""

import json
import os
import sys

import pytest
import torch

from configs.schema import load_config
from models import build_model, make_codec
from models.pretrained import ENCODERS, pipeline_fingerprint
from models.text import TextEncoders
from tests.models.test_pretrained import change
from utils.errors import DataError


def use(folder):
    """All that the program reads of a pipeline."""
    config = load_config(folder)
    TextEncoders(folder)
    make_codec(config).network("cpu")
    build_model(config)
    pipeline_fingerprint(folder, ENCODERS)


def refused(folder, message):
    with pytest.raises(DataError, match=message) as error:
        use(folder)
    assert "\n" not in str(error.value)


@pytest.fixture
def payload(tmp_path):
    """Python that leaves a mark where it is executed; the test fails if it was."""
    mark = tmp_path / "mark"
    yield f"open({str(mark)!r}, 'w')\nclass Evil:\n    from_pretrained = lambda *_, **__: None\n"
    assert not mark.exists() and "strange" not in sys.modules


def test_what_the_index_names_is_not_executed(sdxl_copy, payload):
    """diffusers 0.31 runs such files in a folder of this machine without asking."""
    (sdxl_copy / "strange.py").write_text(payload)
    change(sdxl_copy, "model_index.json", _class_name=["strange", "Evil"])
    use(sdxl_copy)
    for part, named in (("text_encoder", ["strange", "Evil"]), ("tokenizer", ["diffusers", "DiffusionPipeline"]),
                        ("text_encoder_2", "CLIPTextModel"), ("tokenizer_2", ["transformers", "RagTokenizer"])):
        before = json.loads((sdxl_copy / "model_index.json").read_text())[part]
        (sdxl_copy / part / "strange.py").write_text(payload)
        change(sdxl_copy, "model_index.json", **{part: named})
        refused(sdxl_copy, f"model_index.json: {part} is .*, not known here; known: CLIP")
        change(sdxl_copy, "model_index.json", **{part: before})


def shards(folder, weights, name):
    """The part's weights as one shard of this name, which an index leads to."""
    from safetensors.torch import load_file

    tensors = load_file(folder / weights)
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
        (folder / weights).unlink()
    else:
        os.replace(folder / weights, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, name)}
    (folder / f"{weights}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(("part", "weights"), [("unet", "diffusion_pytorch_model.safetensors"),
                                               ("vae", "diffusion_pytorch_model.safetensors"),
                                               ("text_encoder_2", "model.safetensors")])
def test_shards_are_safetensors_beside_their_index(sdxl_copy, part, weights):
    shards(sdxl_copy / part, weights, "first.safetensors")
    use(sdxl_copy)
    (sdxl_copy / part / "first.safetensors").rename(sdxl_copy / part / weights)
    shards(sdxl_copy / part, weights, "../scheduler/first.safetensors")
    refused(sdxl_copy, f"{part}/{weights}.index.json: leads to .*, which is no safetensors file beside it")
    (sdxl_copy / "scheduler/first.safetensors").rename(sdxl_copy / part / weights)
    shards(sdxl_copy / part, weights, "pickle.bin")
    refused(sdxl_copy, f"{part}/{weights}.index.json: leads to pickle.bin, which is no safetensors file beside it")
    (sdxl_copy / part / f"{weights}.index.json").write_text('{"weight_map": 1}')
    refused(sdxl_copy, f"{part}/{weights}.index.json: no index of weights")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer_2"])
def test_pipes_and_devices_are_not_waited_for(sdxl_copy, part):
    os.mkfifo(sdxl_copy / part / "generation_config.json")
    refused(sdxl_copy, f"{part}/generation_config.json: is not a file but a pipe")
    (sdxl_copy / part / "generation_config.json").unlink()
    (sdxl_copy / part / "merges.txt").unlink(missing_ok=True)           # which older transformers write
    (sdxl_copy / part / "merges.txt").symlink_to("/dev/zero")
    refused(sdxl_copy, f"{part}/merges.txt: is not a file but a device")


def test_adapters_of_a_network_elsewhere_are_not_followed(sdxl_copy):
    (sdxl_copy / "text_encoder/adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}')
    refused(sdxl_copy, "adapter_config.json: adapters of a network elsewhere")


@pytest.mark.parametrize(("part", "claim"), [
    ("unet", {"layers_per_block": 10**6}), ("unet", {"transformer_layers_per_block": [1, [10**7]]}),
    ("unet", {"block_out_channels": [8] * 10**5}), ("vae", {"layers_per_block": 10**6}),
    ("text_encoder", {"num_hidden_layers": 10**6})])
def test_layers_without_end_are_refused(sdxl_copy, part, claim):
    change(sdxl_copy, f"{part}/config.json", **claim)
    refused(sdxl_copy, f"{part}/config.json: {next(iter(claim))} .*: at most 100 layers or blocks are possible")


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_network_larger_than_its_file_takes_no_memory(sdxl_copy, part):
    change(sdxl_copy, f"{part}/config.json", block_out_channels=[8192, 8192])
    refused(sdxl_copy, rf"{part}: not loaded: it claims [\d,]+ numbers, its safetensors files have [\d,]+ bytes")
