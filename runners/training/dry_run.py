"""Rehearse a command: check everything, run the network on one image, print sizes, write nothing.

What is absent (data, weights, FID reference) is replaced by a stand-in and listed.
"""

import logging

import torch

from configs.schema import Config
from datasets import build_dataset, find_dataset
from datasets.packed import synthetic_images
from functions.denoiser import Denoiser
from functions.rng import shard_generator
from functions.timesteps import TimeSampler
from models import load_weights
from runners import distributed
from runners.diffusion import Diffusion
from runners.network import Network, explain_amp, resolve_amp
from runners.training.loggers import check_loggers
from runners.training.plan import Plan, split_batch
from utils.errors import DataError
from utils.live_bytes import LiveBytes
from utils.table import print_table

log = logging.getLogger(__name__)
# Memory of a process over that of its tensors, without and with activation checkpointing: the gaps of the allocator,
# as benchmarks/train.py measures them.
CPU_OVERHEAD = {False: 1.35, True: 2.2}


def check_training(config: Config, args) -> int:
    """Refuse what cannot work with the number of processes and the device; returns the number of processes."""
    world = distributed.detect()
    processes = world.size if world else args.num_process_per_node * args.num_proc_node
    split_batch(config.training, processes)
    check_loggers(config.training.loggers)
    resolve_amp(config.training.amp, distributed.pick_device(args.device, distributed.World()))
    return processes


def dry_run_training(config: Config, run, device: torch.device, init_from: str | None = None) -> None:
    """One step with one image on every rank, in turn on a CPU so that memory for one suffices; rank 0 reports."""
    absent = []
    images, num_images = distributed.on_rank_zero(lambda: _training_images(config, run.datasets, absent))
    diffusion = Diffusion(config, device)
    if init_from:
        load_weights(diffusion.model, init_from)
    plan = Plan.make(config.training, num_images, distributed.world_size(), distributed.rank())
    for turn in range(plan.world_size if device.type == "cpu" else 1):
        if plan.rank and (device.type != "cpu" or turn == plan.rank):
            diffusion.model.train()
            _step_memory(diffusion, images[:1])
        distributed.barrier()
    if plan.rank:
        return
    memory, fixed, further = training_memory(diffusion, images, plan)
    print_table({
        "configuration": " ".join(f"{key}={value}" for key, value in config.loss),
        "device": f"{plan.world_size} x {device.type}, amp {explain_amp(config.training.amp, device)}",
        "parameters": f"{sum(p.numel() for p in diffusion.model.parameters()):,}",
        "batch": f"{plan.global_batch} = {plan.world_size} processes x {plan.accumulate} network calls x "
                 f"{plan.micro_batch} images",
        "memory of a process": f"about {memory / 2**30:.2f} GiB ({fixed / 2**30:.2f} for weights and optimizer, "
                               f"{further / 2**20:.0f} MiB for each further image)",
        "training images": f"{num_images:,}",
        "steps": f"{plan.steps_per_epoch:,} in an epoch, {plan.total_steps:,} in the run",
        "absent": ", ".join(absent) or "nothing",
    })


def training_memory(diffusion: Diffusion, images: torch.Tensor, plan: Plan) -> tuple[int, int, int]:
    """Bytes that training by ``plan`` takes, judged by steps with one and with two of ``images``, uint8 (2, C, H, W).

    Returns:
        All of it, the part of weights and optimizer, and what each further image of a network call adds.
    """
    parameters = sum(p.numel() for p in diffusion.model.parameters())
    fixed = parameters * 4 * (4 + len(diffusion.config.training.ema))     # weights, gradients, two moments, averages
    one, two = (_step_memory(diffusion, images[:count]) for count in (1, 2))
    further = two - one
    return fixed + one + further * (plan.micro_batch - 1), fixed, further


def _training_images(config: Config, root, absent: list[str]):
    """Two training images, uint8 (2, C, H, W), and the size of the set; a stand-in where there are no data."""
    try:
        find_dataset(config, root)
    except DataError:
        absent.append(f"data set {config.data.dataset} (noise of the usual number of images stands in)")
        images = synthetic_images(config)
        process_batch, _, _ = split_batch(config.training, distributed.world_size())
        return next(images.batches([torch.arange(2)])), max(images.num_images, process_batch * distributed.world_size())
    dataset = build_dataset(config, root)
    return torch.stack([dataset[i][0] for i in range(2)]), len(dataset)


def _step_memory(diffusion: Diffusion, images: torch.Tensor) -> int:
    """Bytes that a forward and backward pass on (B, C, H, W) needs beyond weights and gradients."""
    config, device = diffusion.config, diffusion.device
    network = Network(diffusion.model, device, resolve_amp(config.training.amp, device))
    labels = torch.zeros(len(images), dtype=torch.long, device=device) if config.model.num_labels else None
    times, generator = TimeSampler.of(config, diffusion.schedule), shard_generator(config.training.seed, 0, 0, device)
    draw = diffusion.draw(images.to(device), labels, times, generator)

    def step():
        denoiser = Denoiser.of(config, network, diffusion.schedule)
        diffusion.loss(denoiser, draw).total.mean().backward()

    step()                                           # the gradients are there now, and counted elsewhere
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with LiveBytes() as live:
            step()
        peak = round(CPU_OVERHEAD[diffusion.model.checkpointing] * live.peak)
    diffusion.model.zero_grad(set_to_none=True)
    return peak
