"""The procedure that this project is compared with: what SA-DPM does in a step, written plainly and without speed.

K separate network calls in float32 NCHW, attention by two products and a softmax, alpha_bar computed from the betas in
each call, clipping and Adam with torch's defaults (Adam parameter by parameter on a CPU, by foreach kernels on a GPU),
EMA by stacking parameters of one shape, a loss that is waited for and logged in every step, images decoded by PIL in
worker processes; sampling copies every state and estimate to the host and writes the PNG files one by one afterwards.

The network is this project's own, with its weights and names, but for attention, dropout and resampling, which compute
the same. ``benchmarks.reference_adm`` and ``benchmarks.reference_edm`` are the procedures of those families.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from configs.schema import Config
from models import adm_blocks, build_model
from models.edm_blocks import UNetBlock
from models.resampling import Resample, ResampledConv
from models.unet import Attention

log = logging.getLogger(__name__)


def attend(block: Attention, x: Tensor) -> Tensor:
    """What ``Attention.forward`` computes, step by step. (B, C, H, W) -> (B, C, H, W)."""
    batch, channels, height, width = x.shape
    normed = block.norm(x)
    q = block.q(normed).reshape(batch, channels, height * width).permute(0, 2, 1)              # (B, HW, C)
    k = block.k(normed).reshape(batch, channels, height * width)                               # (B, C, HW)
    v = block.v(normed).reshape(batch, channels, height * width)                               # (B, C, HW)
    weights = torch.softmax(torch.bmm(q, k) / math.sqrt(channels), dim=2)                      # (B, HW, HW)
    h = torch.bmm(v, weights.permute(0, 2, 1))                                                 # (B, C, HW)
    return x + block.proj_out(h.reshape(batch, channels, height, width))


def attend_adm(block: adm_blocks.Attention, x: Tensor) -> Tensor:
    """The same for ADM's: q and k scaled by d^(-1/4) each, several heads. (B, C, H, W) -> (B, C, H, W)."""
    batch, channels, height, width = x.shape
    d, rows = channels // block.heads, batch * block.heads
    qkv = block.qkv(block.norm(x).reshape(batch, channels, -1))                                # (B, 3C, HW)
    q, k, v = (part.reshape(rows, d, -1) for part in qkv.chunk(3, dim=1)) if block.new_order else (
        qkv.reshape(rows, 3 * d, -1).split(d, dim=1))                                          # (B heads, d, HW) each
    weights = torch.softmax(torch.einsum("bct,bcs->bts", q * d**-0.25, k * d**-0.25), dim=-1)
    h = torch.einsum("bts,bcs->bct", weights, v).reshape(batch, channels, -1)                  # (B, C, HW)
    return x + block.proj_out(h).reshape(batch, channels, height, width)


def attend_edm(block: UNetBlock, h: Tensor) -> Tensor:
    """What ``UNetBlock.attend`` computes: q, k and v vary fastest. (B, C, H, W) -> (B, C, H, W)."""
    d = h.shape[1] // block.heads
    qkv = block.qkv(h).reshape(len(h) * block.heads, d, 3, -1)
    q, k, v = qkv.unbind(2)                                                                    # (B heads, d, HW) each
    weights = torch.softmax(torch.einsum("ncq,nck->nqk", q, k / math.sqrt(d)), dim=2)
    return torch.einsum("nqk,nck->ncq", weights, v).reshape(h.shape)


def build_reference(config: Config, device) -> nn.Module:
    """The network in NCHW with the attention above, torch's dropout and resampling by depthwise convolutions."""
    with torch.device(device):
        network = build_model(config)
    for module in network.modules():
        if isinstance(module, Attention):
            module.forward = partial(attend, module)
        elif isinstance(module, adm_blocks.Attention):
            module.forward = partial(attend_adm, module)
        elif isinstance(module, UNetBlock):
            module.attend = partial(attend_edm, module)
        elif isinstance(module, Resample | ResampledConv):
            module.is_box = False
        elif isinstance(module, nn.Dropout):
            module.forward = partial(nn.Dropout.forward, module)
    return network


def make_betas(config: Config, device) -> Tensor:
    diffusion = config.diffusion
    betas = np.linspace(diffusion.beta_start, diffusion.beta_end, diffusion.num_diffusion_timesteps)
    return torch.tensor(betas, dtype=torch.float32, device=device)


def alpha_bar(betas: Tensor, t: Tensor) -> Tensor:
    """abar_t from the betas, all of them, each time; abar_{-1} = 1. (B,) -> (B, 1, 1, 1)."""
    products = torch.cumprod(1 - torch.cat([torch.zeros(1, device=betas.device), betas]), 0)
    return products[t + 1].reshape(-1, 1, 1, 1)


def sequence_loss(network, betas: Tensor, x0: Tensor, t: Tensor, noise: Tensor, steps: int, lamda: float) -> Tensor:
    """Mean over the batch of ||d_0||^2 + lamda ||sum_k m_k d_k||^2 / K^2, with one network call for each k.

    Args:
        x0: (B, C, H, W) in [-1, 1].
        t: (B,) long.
        noise: (K, B, C, H, W).
    """
    summed, base = torch.zeros_like(x0), None
    for k in range(steps):
        step = (t - k).clamp(min=0)
        abar = alpha_bar(betas, step)
        x = x0 * abar.sqrt() + noise[k] * (1 - abar).sqrt()
        error = noise[k] - network(x, step.float())[:, :x0.shape[1]]           # what comes after are variances
        if k == 0:
            base = error.square().sum(dim=(1, 2, 3))
        summed = summed + error * (t >= k).reshape(-1, 1, 1, 1)
    sequence = summed.square().sum(dim=(1, 2, 3)) / steps**2
    return (base + lamda * sequence).mean() if steps > 1 else base.mean()


class StackedEMA:
    """An average of the parameters, kept as one tensor for each shape."""

    def __init__(self, network: nn.Module, rate: float):
        self.network, self.rate = network, rate
        self.stacks = self._stack()

    @torch.no_grad()
    def _stack(self) -> dict:
        by_shape = defaultdict(list)
        for parameter in self.network.parameters():
            by_shape[parameter.shape].append(parameter)
        return {shape: torch.stack(group) for shape, group in by_shape.items()}

    def update(self) -> None:
        for shape, current in self._stack().items():
            self.stacks[shape] = self.rate * self.stacks[shape] + (1 - self.rate) * current


class Pictures(Dataset):
    """PNG files as float images in [-1, 1], decoded when they are asked for."""

    def __init__(self, folder: Path, flip: bool):
        self.files, self.flip = sorted(Path(folder).glob("*.png")), flip

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        picture = Image.open(self.files[i]).convert("RGB")
        if self.flip and torch.rand(()) < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def endless(folder: Path, config: Config, device: torch.device, workers: int) -> Iterator[Tensor]:
    """Batches of ``Pictures``, pass after pass."""
    loader = DataLoader(Pictures(folder, config.data.random_flip), config.training.batch_size, shuffle=True,
                        drop_last=True, num_workers=workers, persistent_workers=workers > 0,
                        pin_memory=device.type == "cuda")
    while True:
        yield from loader


def follow(average: nn.Module, network: nn.Module, rate: float) -> None:
    """An average of the parameters, one after another."""
    with torch.no_grad():
        for mean, parameter in zip(average.parameters(), network.parameters(), strict=True):
            mean.mul_(rate).add_(parameter, alpha=1 - rate)


def to_pixels(images: Tensor) -> np.ndarray:
    """[-1, 1] (B, C, H, W) -> uint8 (B, H, W, C)."""
    return ((images + 1) * 127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()


class ReferenceTraining:
    """Call it for one step.

    Args:
        folder: Of PNG files.
        workers: Processes that decode them.
    """

    def __init__(self, config: Config, folder: Path, device, workers: int = 2):
        self.config, self.device = config, torch.device(device)
        self.network = build_reference(config, device).train()
        self.betas = make_betas(config, device)
        optim = config.optim
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=optim.lr, betas=(optim.beta1, optim.beta2),
                                          eps=optim.eps)
        self.ema = StackedEMA(self.network, config.training.ema[0].rate)
        self.batches, self.step = endless(folder, config, self.device, workers), 0

    def __call__(self) -> int:
        loss_config, betas = self.config.loss, self.betas
        x0 = next(self.batches).to(self.device)
        low = torch.randint(len(betas), (len(x0) // 2 + 1,), device=self.device)
        t = torch.cat([low, len(betas) - 1 - low])[:len(x0)]
        steps = max(1, loss_config.num_consecutive_steps)
        noise = torch.randn((steps, *x0.shape), device=self.device)
        loss = sequence_loss(self.network, betas, x0, t, noise, steps, loss_config.lamda)
        self.step += 1
        log.info("step %d, loss %f", self.step, loss.item())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.optim.grad_clip or math.inf)
        self.optimizer.step()
        self.ema.update()
        return len(x0)


@torch.no_grad()
def sample_and_save(network: nn.Module, betas: Tensor, x: Tensor, timesteps: list[int], folder: Path) -> int:
    """DDIM with eta 0 from noise ``x`` (B, C, H, W) along ascending ``timesteps``, then a PNG file for each image."""
    states, estimates = [x.cpu()], []
    for i, j in zip(reversed(timesteps), [*reversed(timesteps[:-1]), -1], strict=True):
        t = torch.full((len(x),), i, device=x.device)
        abar, abar_next = alpha_bar(betas, t), alpha_bar(betas, torch.full_like(t, j))
        eps = network(x, t.float())
        x0 = (x - eps * (1 - abar).sqrt()) / abar.sqrt()
        x = abar_next.sqrt() * x0 + (1 - abar_next).sqrt() * eps
        estimates.append(x0.cpu())
        states.append(x.cpu())
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(to_pixels(states[-1])):
        Image.fromarray(pixels).save(folder / f"{number:06d}.png")
    return len(x)
