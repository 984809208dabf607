"""The same network and recipe in the libraries that people use: diffusers, denoising-diffusion-pytorch."""

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from benchmarks.reference import Pictures

WANTED = {"diffusers": "diffusers", "denoising_diffusion_pytorch": "denoising-diffusion-pytorch"}


def diffusers_network():
    """DDPM's CIFAR-10 network, 35,746,307 parameters."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(128, 256, 256, 256), layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), downsample_padding=0,
        flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, attention_head_dim=None, dropout=0.1)


def sdxl_network():
    """Stable Diffusion XL's U-Net, 2,567,463,684 parameters, on latents of 128x128 for images of 1024x1024."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280), layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=[5, 10, 20],
        transformer_layers_per_block=[1, 2, 10], cross_attention_dim=2048, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)


def sdxl_inputs() -> tuple[tuple, dict]:
    """Arguments of a call with one image and a prompt of 77 tokens."""
    added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
    return ((torch.zeros(1, 4, 128, 128), torch.zeros(1), torch.zeros(1, 77, 2048)),
            {"added_cond_kwargs": added, "return_dict": False})


def endless(folder: Path, batch: int, workers: int = 2):
    loader = DataLoader(Pictures(folder, flip=False), batch, shuffle=True, drop_last=True, num_workers=workers,
                        persistent_workers=workers > 0)
    while True:
        yield from loader


def diffusers_training(folder: Path, batch: int, device):
    """A step as in the library's example of unconditional generation, without its accelerator: fp32, AdamW, EMA."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    network, scheduler, batches = diffusers_network().to(device).train(), DDPMScheduler(), endless(folder, batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-4)
    ema = EMAModel(network.parameters(), decay=0.9999)

    def step() -> int:
        x0 = next(batches).to(device)
        noise, t = torch.randn_like(x0), torch.randint(1000, (len(x0),), device=device)
        F.mse_loss(network(scheduler.add_noise(x0, noise, t), t).sample, noise).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        return len(x0)

    return step


def diffusers_sampling(batch: int, steps: int, device):
    """``DDIMPipeline``: NumPy images at the end."""
    from diffusers import DDIMPipeline, DDIMScheduler

    pipeline = DDIMPipeline(diffusers_network().to(device).eval(), DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)

    def sample() -> int:
        return len(pipeline(batch_size=batch, num_inference_steps=steps, output_type="np").images)

    return sample


def denoising_diffusion_training(folder: Path, batch: int, device):
    """The package's own network (28.5 M parameters), loss and average."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    diffusion = GaussianDiffusion(Unet(dim=128, dim_mults=(1, 2, 2, 2), dropout=0.1), image_size=32, timesteps=1000,
                                  objective="pred_noise").to(device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=2e-4)
    average, batches = EMA(diffusion, beta=0.9999, update_every=1), endless(folder, batch)

    def step() -> int:
        x0 = next(batches).to(device)
        diffusion((x0 + 1) / 2).backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        return len(x0)

    return step


def available(makers: dict[str, tuple]) -> dict:
    """``{name: maker}`` from ``{name: (module, maker)}`` for the modules that are installed; the others are named."""
    found = {}
    for name, (module, maker) in makers.items():
        if find_spec(module):
            found[name] = maker
        else:
            print(f"{name} left out: pip install {WANTED[module]}\n", flush=True)
    return found
