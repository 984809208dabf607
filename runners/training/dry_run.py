"""Rehearse a command: check everything, run the network on one image, print sizes, write nothing.

What is absent (data, weights, FID reference) is replaced by a stand-in and listed.
"""

import logging
import time

import torch

from configs.schema import Config
from datasets import build_dataset, find_dataset
from datasets.packed import synthetic_images
from functions.losses import sequence_aware_loss
from functions.rng import SeededNoise, shard_generator
from models import MODELS, load_weights
from runners import distributed
from runners.diffusion import Diffusion
from runners.network import Network, resolve_amp
from runners.training.plan import Plan, split_batch
from utils.errors import DataError, choose
from utils.live_bytes import LiveBytes

log = logging.getLogger(__name__)
# Memory of a process over that of its tensors, without and with activation checkpointing: the gaps of the allocator,
# as benchmarks/train.py measures them.
CPU_OVERHEAD = {False: 1.35, True: 2.2}


def check_training(config: Config, args) -> int:
    """Refuse what cannot work with the number of processes and the device; returns the number of processes."""
    world = distributed.detect()
    processes = world.size if world else args.num_process_per_node * args.num_proc_node
    choose(MODELS, config.model.arch, "model.arch")
    split_batch(config.training, processes)
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
    _print_table({
        "configuration": " ".join(f"{key}={value}" for key, value in config.loss),
        "device": f"{plan.world_size} x {device.type}, amp {resolve_amp(config.training.amp, device) or 'off'}",
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
    fixed = parameters * 4 * (4 + diffusion.config.model.ema)      # weights, gradients, two Adam moments, EMA
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
    x0, t, noise, xi = diffusion.draw(images.to(device), shard_generator(config.training.seed, 0, 0, device))

    def step():
        sequence_aware_loss(network, diffusion.schedule, x0, t, noise, perturbation_noise=xi,
                            **dict(config.loss)).total.mean().backward()

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


def dry_run_sampling(job, device: torch.device) -> None:
    """One network call with one image on every rank, and what the whole ``job`` of generate.py would take."""
    config, weights, settings, num_images = job.config, job.weights, job.settings, len(job.seeds)
    diffusion = Diffusion(config, device)
    if weights:
        diffusion.load(weights, job.args.model_ema)
    noise = SeededNoise([0], device)
    for turn in range(distributed.world_size() if device.type == "cpu" else 1):
        if device.type != "cpu" or turn == distributed.rank():
            x = noise.randn((1, *config.data.shape))
            started = time.perf_counter()
            with torch.no_grad():
                Network(diffusion.model.eval(), device, diffusion.amp)(x, torch.zeros(1, device=device)).sum().item()
            seconds = time.perf_counter() - started
        distributed.barrier()
    if distributed.rank():
        return
    hours = seconds * job.calls * num_images / distributed.world_size() / 3600
    _print_table({
        "device": f"{distributed.world_size()} x {device.type}",
        "weights": f"{weights} ({diffusion.weights.kind}, {diffusion.weights.fingerprint})" if weights else "random",
        "parameters": f"{sum(p.numel() for p in diffusion.model.parameters()):,}",
        "sampler": ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None),
        "network calls": f"{job.calls} for each of {num_images:,} images",
        "time": f"{seconds:.2f} s for one call with one image; at that rate {hours:.1f} h (batches are faster)",
        "absent": ", ".join(job.absent) or "nothing",
    })


def _print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    print("dry run: nothing was written")
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")
