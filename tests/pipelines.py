"""Tiny diffusers pipelines with random weights, saved as a user's folders, and a folder of captioned pictures."""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image

WORDS = ["a", "red", "blue", "green", "square", "on", "grey", "of", "big", "small"]
SIDE = 16                                    # pixels; the autoencoder makes 8 x 8 latents of them


def tokenizer(folder: Path, length: int = 16):
    """CLIP's tokenizer with a vocabulary of a few words, spelled by letters otherwise."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{each}</w>" for each in letters), *(f"{word}</w>" for word in WORDS if len(word) > 1)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            vocabulary.append(parts[0])
    known = {token: number for number, token in enumerate(dict.fromkeys(
        [*vocabulary, "<|startoftext|>", "<|endoftext|>"]))}
    source = folder / "vocabulary"
    source.mkdir(parents=True, exist_ok=True)
    (source / "vocab.json").write_text(json.dumps(known))
    pairs = list(dict.fromkeys(f"{a} {b}" for a, b in merges))
    (source / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
    return CLIPTokenizer(str(source / "vocab.json"), str(source / "merges.txt"), model_max_length=length), len(known)


def text_config(size: int, end: int, width: int = 32, length: int = 16, **more):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(vocab_size=size, hidden_size=width, intermediate_size=2 * width, num_attention_heads=4,
                          num_hidden_layers=2, max_position_embeddings=length, projection_dim=width, hidden_act="gelu",
                          bos_token_id=end - 1, eos_token_id=end, pad_token_id=end, **more)


def vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 32),
                         down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                         norm_num_groups=8, sample_size=SIDE, scaling_factor=0.5)


def text_unet(sdxl: bool):
    from diffusers import UNet2DConditionModel

    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "cross_attention_dim": 64,
            "projection_class_embeddings_input_dim": 32 + 6 * 8, "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2)} if sdxl else {"cross_attention_dim": 32}
    return UNet2DConditionModel(sample_size=SIDE // 2, in_channels=4, out_channels=4, block_out_channels=(32, 32),
                                layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
                                norm_num_groups=8, **more)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False,
         "steps_offset": 1, "clip_sample": False}


def sdxl_pipeline(folder: Path) -> Path:
    """A complete tiny SDXL with eps, Euler's scheduler file as the published one has it."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    words, size = tokenizer(folder.parent)
    config = text_config(size, size - 1)
    scheduler = EulerDiscreteScheduler(**{key: BETAS[key] for key in BETAS if key.startswith("beta")},
                                       timestep_spacing="leading", steps_offset=1)
    scheduler.register_to_config(set_alpha_to_one=False, clip_sample=False)
    _quiet(StableDiffusionXLPipeline(
        vae=vae(), text_encoder=CLIPTextModel(config), text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=words, tokenizer_2=words, unet=text_unet(True), scheduler=scheduler)).save_pretrained(folder)
    return folder


def sd_pipeline(folder: Path, prediction: str = "v_prediction") -> Path:
    """A complete tiny Stable Diffusion 1.5."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(1)
    words, size = tokenizer(folder.parent)
    scheduler = PNDMScheduler(**{key: value for key, value in BETAS.items() if key != "clip_sample"},
                              skip_prk_steps=True, prediction_type=prediction)
    _quiet(StableDiffusionPipeline(
        vae=vae(), text_encoder=CLIPTextModel(text_config(size, size - 1)), tokenizer=words, unet=text_unet(False),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )).save_pretrained(folder)
    return folder


def ddpm_pipeline(folder: Path, **settings) -> Path:
    """A tiny DDPM of pixels as diffusers makes it, with the heads of its own defaults."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(2)
    unet = UNet2DModel(**{"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (32, 32),
                          "layers_per_block": 1, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                          "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 8, **settings})
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=1000)).save_pretrained(folder)
    return folder


def latent_pipeline(folder: Path) -> Path:
    """A tiny unconditional latent model, whose pipeline calls its autoencoder ``vqvae``."""
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel

    torch.manual_seed(3)
    unet = UNet2DModel(sample_size=SIDE // 2, in_channels=4, out_channels=4, block_out_channels=(32, 32),
                       layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                       up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8)
    LDMPipeline(vae(), unet, DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear",
                                           clip_sample=False)).save_pretrained(folder)
    return folder


def _quiet(pipeline):
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    return pipeline


def captioned_folder(folder: Path, count: int = 16) -> Path:
    """JPEGs of squares with captions, of three sizes: ``metadata.jsonl`` as the imagefolder format has it."""
    folder.mkdir(parents=True)
    random, lines = np.random.RandomState(0), []
    colours = {"red": (200, 40, 40), "blue": (40, 40, 200), "green": (40, 160, 40)}
    for i in range(count):
        height, width = [(20, 20), (18, 30), (32, 20)][i % 3]
        pixels = np.full((height, width, 3), 128, np.uint8)
        name = list(colours)[i % 3]
        top, left = random.randint(0, height - 8), random.randint(0, width - 8)
        pixels[top:top + 8, left:left + 8] = colours[name]
        Image.fromarray(pixels).save(folder / f"{i:03d}.jpg", quality=95)
        lines.append(json.dumps({"file_name": f"{i:03d}.jpg", "text": f"a {name} square on grey"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder
