"""Folders and files of diffusers that are fuzzed; see ``fuzz_kinds``."""

import json
import tempfile
from functools import cache
from pathlib import Path

from benchmarks.fuzz_data import SIDE, tiny_model, write


def make_diffusers(folder: Path, rng) -> list[str]:
    from safetensors.torch import save

    settings = {"_class_name": "UNet2DModel", "sample_size": SIDE, "block_out_channels": [32], "layers_per_block": 1,
                "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "flip_sin_to_cos": False,
                "freq_shift": 1, "norm_eps": 1e-6, "downsample_padding": 0, "attention_head_dim": 32}
    state = {name: tensor.contiguous() for name, tensor in tiny_model().state_dict().items()}
    return write(folder, {"config.json": json.dumps(settings), "diffusion_pytorch_model.safetensors": save(state)})


def read_diffusers(folder: Path, rng) -> None:
    from models.weights import load_weights

    load_weights(tiny_model(), folder)


@cache
def pipeline_files(kind: str) -> dict[str, bytes]:
    """Of a tiny pipeline as diffusers writes it, by their names in its folder."""
    from tests import pipelines

    with tempfile.TemporaryDirectory() as name:
        root = getattr(pipelines, f"{kind}_pipeline")(Path(name) / "made/pipeline")
        return {f"pipeline/{path.relative_to(root)}": path.read_bytes() for path in root.rglob("*") if path.is_file()}


def make_pipeline(folder: Path, rng) -> list[str]:
    return write(folder, pipeline_files(rng.choice(("sdxl", "sd", "ddpm"))))


def read_pipeline(folder: Path, rng) -> None:
    """What sampling reads of it."""
    import torch

    from configs.pipelines import takes_text, unet_settings
    from configs.schema import load_config
    from models import build_model, make_codec
    from models.pretrained import ENCODERS, pipeline_fingerprint
    from models.text import TextEncoders

    path = folder / "pipeline"
    config = load_config(path)
    codec = make_codec(config)
    pipeline_fingerprint(path, ("unet", *ENCODERS))
    build_model(config)
    if takes_text(unet_settings(path)):
        TextEncoders(path)("a red square", "a cat")
        codec.decode(torch.zeros(1, *codec.shape))


@cache
def lora_network():
    """A text-to-image network with adapters, and their file."""
    from safetensors.torch import save

    from configs.schema import load_config
    from models import build_model
    from models.pretrained import lora_to_file
    from models.trained import trained

    with tempfile.TemporaryDirectory() as name:
        write(Path(name), pipeline_files("sd"))
        model = build_model(load_config(Path(name) / "pipeline", ["model.lora_rank=2"]))
    return model, save(lora_to_file(trained(model), 1.0))


def read_lora(folder: Path, rng) -> None:
    from models import load_weights

    load_weights(lora_network()[0], folder)


PIPELINE_KINDS = {
    "diffusers": (make_diffusers, read_diffusers), "pipeline": (make_pipeline, read_pipeline),
    "lora": (lambda folder, rng: write(folder, {"pytorch_lora_weights.safetensors": lora_network()[1]}), read_lora),
}
