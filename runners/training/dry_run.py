"""Rehearse a command: check everything, run the network on one image, print sizes, write nothing.

What is absent (data, weights, FID reference) is replaced by a stand-in and listed.
"""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from configs.schema import Config
from datasets import build_dataset, find_dataset
from datasets.images import UnreadableImage
from datasets.packed import choose_cache, synthetic_images
from functions.denoiser import Denoiser
from functions.prediction import make_prediction
from functions.rng import shard_generator
from functions.schedule import make_schedule
from functions.timesteps import TimeSampler, sampling_times
from models import load_weights
from runners import distributed
from runners.diffusion import Diffusion
from runners.network import Network, explain_amp, resolve_amp
from runners.training.loggers import check_loggers
from runners.training.optimizer import fixed_bytes
from runners.training.plan import Plan, split_batch
from utils.errors import DataError, UserError
from utils.live_bytes import LiveBytes
from utils.memory import available_memory
from utils.table import print_table

log = logging.getLogger(__name__)
# Memory of a process over that of its tensors, without and with activation checkpointing: the gaps of the allocator,
# as benchmarks/train.py measures them.
CPU_OVERHEAD = {False: 1.35, True: 2.2}
TRIED = 100                                          # images that are decoded


def check_training(config: Config, args) -> None:
    """Refuse what cannot work with the number of processes and the device."""
    world = distributed.detect()
    processes = world.size if world else args.num_process_per_node * args.num_proc_node
    split_batch(config.training, processes)
    _check_sheets(config)
    check_loggers(config.training.loggers)
    resolve_amp(config.training.amp, distributed.pick_device(args.device, distributed.World()))


def _check_sheets(config: Config) -> None:
    """UserError where the first sheet of samples would be the first to find its steps impossible."""
    training, diffusion = config.training, config.diffusion
    if training.sample_num or training.fid_freq:
        try:
            sampling_times(make_schedule(diffusion), training.sample_timesteps, None,
                           prediction=make_prediction(diffusion))
        except ValueError as error:
            raise UserError(f"sheets of samples: training.sample_timesteps {training.sample_timesteps}, "
                            f"diffusion.skip_type {diffusion.skip_type}: {error}") from None


def dry_run_training(config: Config, run, device: torch.device, init_from: str | None = None) -> None:
    """One step with one image on every rank, in turn on a CPU so that memory for one suffices; rank 0 reports."""
    absent = []
    if config.model.arch == "diffusers":
        return _rehearse_pretrained(config, run, absent)
    log.info("looking at the data")
    images, num_images, tried = distributed.on_rank_zero(lambda: _training_images(config, run.datasets, absent))
    log.info("building the network")
    diffusion = Diffusion(config, device)
    if init_from:
        load_weights(diffusion.model, init_from)
    resident = resident_bytes(config, num_images, device)               # as training finds the GPU: with weights only
    plan = Plan.make(config.training, num_images, distributed.world_size(), distributed.rank())
    for turn in range(plan.world_size if device.type == "cpu" else 1):
        if plan.rank and (device.type != "cpu" or turn == plan.rank):
            diffusion.model.train()
            _step_memory(diffusion, images[:1])
        distributed.barrier()
    if plan.rank:
        return
    log.info("steps with one and with two images; those of a large network take minutes on a CPU")
    memory, fixed, further = training_memory(diffusion, images, plan)
    seconds = step_seconds(diffusion, images, plan, memory)
    memory += resident
    here, room = distributed.processes_on_this_node(), memory_here(device)
    on_one_device = memory * (here if device.type == "cpu" else 1)
    print_table({
        "configuration": " ".join(f"{key}={value}" for key, value in config.loss),
        "device": f"{plan.world_size} x {device.type}, amp {explain_amp(config.training.amp, device)}",
        "parameters": f"{sum(p.numel() for p in diffusion.model.parameters()):,}",
        "batch": f"{plan.global_batch} = {plan.world_size} processes x {plan.accumulate} network calls x "
                 f"{plan.micro_batch} images",
        "memory of a process": f"about {memory / 2**30:.2f} GiB ({fixed / 2**30:.2f} for weights and optimizer, "
                               f"{further / 2**20:.0f} MiB for each further image"
                               + f", {resident / 2**30:.2f} for the data set" * bool(resident) + ")",
        "memory of this machine": room_in_words(on_one_device, room, here, device),
        "training images": f"{num_images:,}; {tried}",
        "steps": f"{plan.steps_per_epoch:,} in an epoch, {plan.total_steps:,} in the run",
        "time": f"about {in_words(seconds * plan.total_steps)} for the run, {digits(seconds)} s for a step",
        "absent": ", ".join(absent) or "nothing",
    })


def _rehearse_pretrained(config: Config, run, absent: list[str]) -> None:
    """A U-Net of diffusers by its shape alone, rank 0."""
    from runners.training.shape_run import dry_run_pretrained

    if distributed.rank():
        return
    try:
        num_images = len(build_dataset(config, run.datasets))
    except UserError as error:
        absent.append(f"data set {config.data.dataset}: {error}")
        num_images = None
    world = distributed.world_size()
    process_batch, _, _ = split_batch(config.training, world)
    plan = Plan.make(config.training, num_images or process_batch * world, world, 0)
    dry_run_pretrained(config, num_images, plan, absent)


def room_in_words(needed: float, room: float, processes: int, device: torch.device) -> str:
    """Whether what the processes of this machine (or of one GPU) need is there, both in bytes."""
    who = f"its {processes} processes need" if device.type == "cpu" and processes > 1 else "needed:"
    verdict = "enough" if needed < room else \
        "TOO LITTLE: lower training.micro_batch_size, or set training.activation_checkpointing true"
    return f"{who} about {needed / 2**30:.2f} GiB of {room / 2**30:.2f}: {verdict}"


def memory_here(device: torch.device) -> float:
    """Bytes that this process may have of its GPU, or that this machine or container may use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return available_memory()


def resident_bytes(config: Config, num_images: int, device: torch.device) -> int:
    """Of the images, where each process has its own on the device."""
    size = num_images * math.prod(config.data.shape)
    cache = choose_cache(size, device) if config.data.cache == "auto" else config.data.cache
    return size if cache == "device" or (cache == "ram" and device.type == "cpu") else 0


def in_words(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} seconds"


def digits(seconds: float) -> str:
    """Two digits, without an exponent where there are more: 0.12, 1.9, 140."""
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


def step_seconds(diffusion: Diffusion, images: torch.Tensor, plan: Plan, memory: float) -> float:
    """Time of an optimizer step. A GPU takes it with the real batch where that fits; elsewhere two images tell."""
    device, count = diffusion.device, len(images)
    if device.type == "cuda" and memory < 0.8 * torch.cuda.mem_get_info(device)[0]:
        count = plan.micro_batch
    step = _make_step(diffusion, images[torch.arange(count) % len(images)])
    if device.type == "cuda":
        step()                                       # chooses its kernels
        torch.cuda.synchronize(device)
    before = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - before
    diffusion.model.zero_grad(set_to_none=True)
    return seconds / count * plan.micro_batch * plan.accumulate


def training_memory(diffusion: Diffusion, images: torch.Tensor, plan: Plan) -> tuple[int, int, int]:
    """Bytes that training by ``plan`` takes, judged by steps with one and with two of ``images``, uint8 (2, C, H, W).

    Returns:
        All of it, the part of weights and optimizer, and what each further image of a network call adds.
    """
    fixed = fixed_bytes(diffusion.model, diffusion.config)
    one, two = (_step_memory(diffusion, images[:count]) for count in (1, 2))
    further = two - one
    return fixed + one + further * (plan.micro_batch - 1), fixed, further


def _training_images(config: Config, root, absent: list[str]):
    """Two training images, uint8 (2, C, H, W), the size of the set, and how many were tried; a stand-in without data.

    Raises:
        DataError: data.root is a file of something else, or more of the first TRIED images are unreadable than
            data.skip_bad allows.
    """
    try:
        find_dataset(config, root)
    except DataError:
        named = config.data.root
        if named and Path(named).expanduser().is_file():
            raise                                    # it holds something else
        where = f" in data.root {named}" if named else ""
        absent.append(f"data set {config.data.dataset}{where} (noise of the usual number of images stands in)")
        images = synthetic_images(config)
        process_batch, _, _ = split_batch(config.training, distributed.world_size())
        return (next(images.batches([torch.arange(2)])),
                max(images.num_images, process_batch * distributed.world_size()), "none was read")
    dataset, good, bad = build_dataset(config, root), [], []
    tried = min(TRIED, len(dataset))
    for i in range(tried):
        try:
            image = dataset[i][0]
        except UnreadableImage as error:
            bad.append(str(error))
        else:
            good = [*good, image][:2]
    if len(bad) > config.data.skip_bad or not good:
        raise DataError(f"{bad[0]} ({len(bad)} unreadable of the first {tried}, data.skip_bad allows "
                        f"{config.data.skip_bad})")
    told = f"the first {tried} are readable" if not bad else f"{len(bad)} of the first {tried} are unreadable"
    return torch.stack([good[0], good[-1]]), len(dataset), told


def _make_step(diffusion: Diffusion, images: torch.Tensor) -> Callable:
    """A forward and backward pass on (B, C, H, W)."""
    config, device = diffusion.config, diffusion.device
    network = Network(diffusion.model, device, resolve_amp(config.training.amp, device))
    labels = {"labels": torch.zeros(len(images), dtype=torch.long, device=device)} if config.model.num_labels else {}
    times, generator = TimeSampler.of(config, diffusion.schedule), shard_generator(config.training.seed, 0, 0, device)
    draw = diffusion.objective.draw(images.to(device), labels, times, generator)

    def step():
        denoiser = Denoiser.of(config, network, diffusion.schedule)
        diffusion.objective.loss(denoiser, draw).total.mean().backward()

    return step


def _step_memory(diffusion: Diffusion, images: torch.Tensor) -> int:
    """Bytes that a forward and backward pass on (B, C, H, W) needs beyond weights and gradients."""
    device, step = diffusion.device, _make_step(diffusion, images)
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
