"""What the scripts here measure: pictures to train on, configurations, and this project's own step and chain."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.reference import build_reference
from configs.schema import Config, load_config
from runners.diffusion import Diffusion
from runners.signals import Signals
from runners.training.checkpoint import RunFolder
from runners.training.plan import Plan
from runners.training.session import Session
from utils.memory import keep_freed_memory

AMP = {"fp32": "off", "bf16": "bf16", "bf16 compiled": "bf16"}


def write_pictures(folder: Path, num: int, side: int) -> Path:
    """PNG files that compress like photographs: coarse noise, enlarged, with some fine noise on top."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(num):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
        pixels = np.asarray(coarse).astype(int) + rng.integers(-8, 9, (side, side, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:06d}.png")
    return folder


def make_config(folder: Path, batch: int, precision: str = "fp32", steps: int = 2, name: str = "cifar10.yml",
                **overrides) -> Config:
    """A shipped configuration on ``folder``; ``precision`` is a key of AMP, ``steps`` is K, 1 without its term."""
    keys = {"data.dataset": "FOLDER", "data.root": folder, "data.num_workers": 0, "training.batch_size": batch,
            "training.n_epochs": 10**6, "training.amp": AMP[precision],
            "training.compile": "on" if "compiled" in precision else "off",
            "loss.num_consecutive_steps": steps, "loss.lamda": 1.0 if steps > 1 else 0.0, **overrides}
    return load_config(name, [f"{key}={value}" for key, value in keys.items()])


class Training:
    """``Diffusion.train_step`` with all that belongs to it: data, optimizer, EMA, metrics. Call it for one step."""

    def __init__(self, config: Config, folder: Path, device):
        self.config, self.diffusion = config, Diffusion(config, device)
        run = RunFolder(folder / "run", folder / "datasets")
        images = self.diffusion.open_training_images(run)
        self.plan = Plan.make(config.training, images.num_images, 1)
        self.session = Session(self.diffusion, run, self.plan, images, Signals(), None)
        self.session.open()

    def __call__(self) -> int:
        self.diffusion.train_step(self.session)
        self.session.report()
        return self.plan.global_batch


def as_scripts_do(device) -> None:
    """What ``runners.cli.run_script`` does for a process."""
    if torch.device(device).type == "cpu":
        keep_freed_memory()


def our_training(config: Config, folder: Path, device) -> Training:
    """In a process of its own."""
    as_scripts_do(device)
    return Training(config, folder, device)


def step_flops(config: Config) -> tuple[int, int]:
    """FLOPs of one image through the network: forward, and forward with backward. Counted without computing."""
    with FakeTensorMode():
        network = build_reference(config, "cpu")          # its attention is made of products that are counted
        x, t = torch.empty(1, *config.data.shape), torch.empty(1)
        condition = {"labels": torch.zeros(1, dtype=torch.long)} if config.model.num_labels else {}
        with FlopCounterMode(display=False) as counter:
            loss = network(x, t, **condition).sum()
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
    return forward, forward + counter.get_total_flops()
