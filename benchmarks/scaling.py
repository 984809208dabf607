"""How a step and a chain grow with K, image size, batch, steps, images and processes; a model of many GPUs.

    python -m benchmarks.scaling                    # measures on this machine, then prints the model
    python -m benchmarks.scaling --parts model      # the model alone: docs/scaling.md

The model predicts the efficiency of data parallelism from a config's FLOPs and parameters. Its assumptions are the
constants below.
"""

import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peers
from benchmarks.harness import alternate, arguments, markdown, report, table
from benchmarks.startup import ROOT
from benchmarks.workload import Training, as_scripts_do, make_config, step_flops, write_pictures
from configs.schema import Config, load_config
from models import build_model
from runners.diffusion import Diffusion

GPU_FLOPS = 0.35 * 800e12           # FLOP/s of a step: the target utilisation of the bf16 matrix rate of a Hopper GPU
GPUS_OF_A_NODE = 8
NVLINK = 450e9                      # bytes/s of a GPU in each direction
INFINIBAND, ETHERNET = 50e9, {"12.5 GB/s": 12.5e9, "1.25 GB/s": 1.25e9}                 # of a GPU
LATENCY = 10e-6                     # seconds of one message between two nodes
BUCKET = 25 * 2**20                 # bytes that DDP reduces at a time
BACKWARD = 2 / 3                    # share of a step in which gradients appear and buckets can travel
PROCESS_ROUNDS = 3                  # launches of each: the median of many steps each time
GPUS = (8, 64, 1024)                # of the table of all configurations
ETHERNET_GPUS = (16, 64, 1024)      # of the one of these: 32x32, 64x64 and 256x256 images
TYPICAL = ("cifar10", "celeba", "celebahq", "adm/imagenet64", "edm/cifar10_ddpmpp")


def all_reduce_seconds(gradient: float, gpus: int, network: float) -> float:
    """A ring within each node, then one over the nodes for each GPU's eighth of the gradient.

    Args:
        gradient: Bytes.
        network: Bytes/s of one GPU's share of the node's links.
    """
    local, nodes = min(gpus, GPUS_OF_A_NODE), max(1, gpus // GPUS_OF_A_NODE)
    inside = 2 * (local - 1) / local * gradient / NVLINK
    between = 2 * (nodes - 1) / nodes * gradient / local / network
    messages = 2 * math.log2(nodes) * LATENCY * -(-gradient // BUCKET)           # NCCL's trees
    return inside + between + messages


def efficiency(compute: float, gradient: float, gpus: int, network: float) -> float:
    """Share of the time spent computing, 0 to 1. All but the last bucket hides behind the backward pass.

    Args:
        compute: Seconds of a step on one GPU.
    """
    if gpus == 1:
        return 1.0
    whole = all_reduce_seconds(gradient, gpus, network)
    last = all_reduce_seconds(min(gradient, BUCKET), gpus, network)
    exposed = max(last, whole - BACKWARD * compute)
    return compute / (compute + exposed)


def gpu_batch(config: Config) -> int:
    """Images of a GPU: as the file says; a global batch is meant for eight GPUs."""
    whole = config.training.global_batch_size
    return max(1, whole // GPUS_OF_A_NODE) if whole else config.training.batch_size


def needs(config: Config) -> tuple[int, int]:
    """FLOPs of a step on one GPU, and bytes of its gradient."""
    with torch.device("meta"):
        gradient = 4 * sum(p.numel() for p in build_model(config).parameters())
    evaluations = max(1, config.loss.num_consecutive_steps) if config.loss.lamda > 0 else 1
    return step_flops(config)[1] * gpu_batch(config) * evaluations, gradient


def sdxl_needs(rank: int = 64) -> dict[str, tuple[int, int]]:
    """The same of SDXL's U-Net with one image, all weights or adapters on its attention; empty without diffusers."""
    if not find_spec("diffusers"):
        return {}
    with FakeTensorMode():
        network, (positional, named) = peers.sdxl_network(), peers.sdxl_inputs()
        with FlopCounterMode(display=False) as counter:
            network(*positional, **named)[0].sum().backward()
        whole = counter.get_total_flops()
    parameters = sum(p.numel() for p in network.parameters())
    adapted = [module for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)
               and ".attn" in name and name.rsplit(".", 1)[-1] in ("to_q", "to_k", "to_v", "0")]
    lora = sum(rank * (layer.in_features + layer.out_features) for layer in adapted)
    # Frozen weights have no gradient: the backward pass is one product for each layer instead of two.
    return {"SDXL U-Net, batch 1": (whole, 4 * parameters), f"SDXL U-Net, LoRA {rank}": (whole * 2 // 3, 4 * lora)}


def shipped() -> dict[str, Path]:
    """Configurations by name, but those of pretrained networks; of families without those that differ by their loss."""
    folder = ROOT / "configs"
    files = [*sorted(folder.glob("*.yml")), *sorted(folder.glob("adm/*.yml")), *sorted(folder.glob("edm/*.yml"))]
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}
    return {name: path for name, path in names.items() if ("/" not in name or not name.endswith("_ip"))
            and load_config(path).model.arch != "diffusers"}


def model() -> None:
    """Predicted efficiency of each shipped configuration, with the batch of a GPU kept as GPUs are added."""
    found = {name: needs(load_config(path)) for name, path in shipped().items()} | sdxl_needs()

    def shares(name: str, counts: tuple[int, ...], network: float) -> list[str]:
        flops, gradient = found[name]
        return [f"{efficiency(flops / GPU_FLOPS, gradient, gpus, network):.1%}" for gpus in counts]

    rows = [[name, flops / 1e12, gradient / 2**20, *shares(name, GPUS, INFINIBAND)]
            for name, (flops, gradient) in found.items()]
    print(markdown(["InfiniBand, 50 GB/s", "TFLOP a step", "gradient, MiB", *(f"{n:,} GPUs" for n in GPUS)], rows))
    rows = [[name, *(share for network in ETHERNET.values() for share in shares(name, ETHERNET_GPUS, network))]
            for name in found if name in TYPICAL or name.startswith("SDXL")]
    print("\n" + markdown(["Ethernet", *(f"{name}, {n:,} GPUs" for name in ETHERNET for n in ETHERNET_GPUS)], rows),
          flush=True)


def training_growth(args, folder: Path) -> None:
    """One quantity at a time, the small network: seconds for each image and network evaluation should stay."""
    sizes = {side: write_pictures(folder / f"pictures{side}", 256, side) for side in (16, 32, 64)}
    tiny = partial(make_config, name="cifar10_tiny.yml")
    cases = {"K = 2, 32x32, batch 32": (tiny(sizes[32], 32), 32 * 2)}
    cases |= {f"K = {k}": (tiny(sizes[32], 32, steps=k), 32 * k) for k in (1, 3, 4)}
    cases |= {f"batch {batch}": (tiny(sizes[32], batch), batch * 2) for batch in (8, 64)}
    cases |= {f"{side}x{side}": (tiny(sizes[side], 32, **{"data.image_size": side}), 32 * 2) for side in (16, 64)}
    calls = {name: Training(config, folder, args.device) for name, (config, _) in cases.items()}
    rates = alternate(calls, args.rounds)
    rows = []
    for name, (config, evaluations) in cases.items():
        seconds = config.training.batch_size / statistics.median(rates[name])
        pixels = evaluations * config.data.height * config.data.width
        rows.append([name, seconds, seconds / evaluations * 1e3, seconds / pixels * 1e9])
    table("training step, 1.1 M parameters", ["seconds", "ms per evaluation", "ns per pixel"], rows, rates=rates)
    print()


def sampling_growth(args, folder: Path) -> None:
    config = make_config(folder, 32, name="cifar10_tiny.yml")
    diffusion = Diffusion(config, args.device)

    def sample(steps: int, images: int) -> int:
        return sum(len(batch.seeds) for batch in diffusion.sample(range(images), timesteps=steps, batch_size=32))

    cases = [(5, 32), (10, 32), (5, 64)]
    rates = alternate({f"{steps} steps, {images} images": partial(sample, steps, images) for steps, images in cases},
                      args.rounds)
    rows = [[name, images / statistics.median(rates[name]), 1e3 / statistics.median(rates[name]) / steps]
            for name, (steps, images) in zip(rates, cases, strict=True)]
    table("DDIM, 1.1 M parameters, 32x32, batch 32", ["seconds", "ms per image and step"], rows, rates=rates)
    print()


def process_rate(folder: Path, pictures: Path, processes: int, threads: int, steps: int = 6) -> float:
    """Images/s of ``train_ddp.py``, the median of its logging intervals but the first; the global batch is the same."""
    with tempfile.TemporaryDirectory(dir=folder) as exp:
        flags = {"config": "cifar10_tiny.yml", "exp": exp, "device": "cpu", "amp": "off", "max_steps": steps,
                 "verbose": "critical",
                 "num_process_per_node": processes, "data.dataset": "FOLDER", "data.root": pictures,
                 "training.global_batch_size": 16, "training.micro_batch_size": 8, "training.log_freq": 1,
                 "training.sample_num": 0}
        command = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        subprocess.run([sys.executable, "train_ddp.py", *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        lines = (Path(exp) / "logs/cifar10_tiny/metrics.jsonl").read_text().splitlines()
        return statistics.median(json.loads(line)["images_per_s"] for line in lines[1:])


def processes(args, folder: Path) -> None:
    """One process with two threads, two ranks with one each, one process with one: in turn."""
    pictures = write_pictures(folder / "pictures", 256, 32)
    cases = {"1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1), "1 process, 1 thread": (1, 1)}
    rates = {name: [] for name in cases}
    for _ in range(min(args.rounds, PROCESS_ROUNDS)):
        for name, case in cases.items():
            rates[name].append(process_rate(folder, pictures, *case))
    report("cifar10_tiny, K = 2, global batch 16", rates, baseline="1 process, 2 threads")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    config = load_config("cifar10_tiny.yml")
    gradient = 4 * sum(p.numel() for p in build_model(config).parameters())
    reduce = measured_all_reduce(gradient, folder)
    alone = 8 / medians["1 process, 1 thread"]                       # a rank's own half of the batch
    pair = 16 / medians["2 processes, 1 thread each"]
    print(f"\nTwo ranks: {alone:.3f} s to compute half a batch, {reduce * 1e3:.1f} ms to average "
          f"{gradient / 2**20:.1f} MiB (gloo). Predicted efficiency {alone / (alone + reduce):.1%} (nothing hidden) to "
          f"100%, measured {alone / pair:.1%} of two times one thread.\n", flush=True)


def measured_all_reduce(gradient: int, folder: Path) -> float:
    """Seconds, through gloo between two processes of this machine."""
    context = multiprocessing.get_context("spawn")
    queue, ranks = context.Queue(), []
    for rank in range(2):
        ranks.append(context.Process(target=_reduce, args=(rank, gradient, str(folder / "store"), queue)))
        ranks[-1].start()
    seconds = queue.get()
    for process in ranks:
        process.join()
    return seconds


def _reduce(rank: int, gradient: int, store: str, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    values, spent = torch.zeros(gradient // 4), []
    for _ in range(20):
        start = time.perf_counter()
        dist.all_reduce(values)
        spent.append(time.perf_counter() - start)
    if rank == 0:
        queue.put(statistics.median(spent))
    dist.destroy_process_group()


def main():
    parser = arguments(__doc__)
    parts = {"training": training_growth, "sampling": sampling_growth, "processes": processes,
             "model": lambda args, folder: model()}
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=list(parts))
    args = parser.parse_args()
    as_scripts_do(args.device)
    for name in args.parts:
        with tempfile.TemporaryDirectory() as temporary:
            parts[name](args, Path(temporary))


if __name__ == "__main__":
    main()
