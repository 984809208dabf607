"""Rehearse generate.py: check everything, call the network once, print what the whole request would take."""

import time

import torch

from functions.rng import SeededNoise
from models import about_weights
from runners import distributed
from runners.diffusion import Diffusion
from runners.network import resolve_amp
from runners.sampling.prompts import prompts_of
from utils.table import print_table


def dry_run_sampling(job, device: torch.device) -> None:
    """Load the network; call it with one image on every rank and say what all images of ``job`` would take, or name
    the folder that --export would write."""
    config, weights = job.config, job.weights
    diffusion = Diffusion(config, device)
    diffusion.amp = distributed.on_rank_zero(lambda: resolve_amp(job.args.amp, device))
    if weights:
        diffusion.load(weights, job.args.model_ema)
    if job.guide:
        diffusion.guide = Diffusion(job.guide[0], device)
        diffusion.guide.load(job.guide[1], job.args.model_ema)
    if job.classifier:
        diffusion.classifier = job.classifier.to(device, diffusion.amp)
    told = {"export": job.args.export} if job.args.export else _call(job, diffusion)
    if distributed.rank():
        return
    print_table({
        "device": f"{distributed.world_size()} x {device.type}",
        "weights": f"{weights} ({diffusion.weights.kind}, {diffusion.weights.fingerprint})" if weights else getattr(
            config.model, "pretrained", "random"),
        "parameters": f"{sum(p.numel() for p in diffusion.model.parameters()):,}",
        **told,
        **(about_weights(weights) if weights else {}),
        "absent": ", ".join(job.absent) or "nothing",
    })


def _call(job, diffusion: Diffusion) -> dict[str, str]:
    device, settings, num_images = diffusion.device, job.settings, len(job.seeds)
    diffusion.prompts = prompts_of(job, device)
    sampler, noise = diffusion.sampler(settings), SeededNoise([0], device)
    denoiser = sampler.denoiser.given(sampler.told(sampler.condition([0])))
    for turn in range(distributed.world_size() if device.type == "cpu" else 1):
        if device.type != "cpu" or turn == distributed.rank():
            x = noise.randn((1, *diffusion.codec.shape))
            started = time.perf_counter()
            with torch.no_grad():
                x0 = denoiser(x, sampler.times[0]).x0
            x0.sum().item()                          # waits for a GPU
            seconds = time.perf_counter() - started
            diffusion.codec.decode(x0)
        distributed.barrier()
    hours = seconds * sampler.calls * num_images / distributed.world_size() / 3600
    return {
        "sampler": str(settings),
        "network calls": f"{sampler.calls} for each of {num_images:,} images",
        "time": f"{seconds:.2f} s for one call with one image; at that rate {hours:.1f} h (batches are faster)",
    }
