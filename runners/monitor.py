"""What a training run shows: metrics.jsonl, TensorBoard, the log file, the progress bar, sample grids."""

import json
import logging
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from runners import distributed
from runners.checkpoint import RunFolder
from utils.atomic import atomic_write, write_text

log = logging.getLogger(__name__)
QUARTILES = 4


class Monitor:
    """Sums the losses of a logging interval on the device and publishes their means; only rank 0 writes.

    Nothing here waits for the device between logging points.
    """

    def __init__(self, run: RunFolder, plan, device: torch.device, first_step: int, sums: list | None = None):
        self.run, self.plan, self.device = run, plan, device
        self.sums = torch.zeros(3 + 2 * QUARTILES + 2, dtype=torch.float64, device=device)
        if sums is not None:                         # the part of an interval that a resumed run had already seen
            mine = sums[distributed.rank()] if len(sums) == plan.world_size else None
            self.sums += torch.tensor(mine or [0.0] * len(self.sums), dtype=torch.float64, device=device)
        self.started, self.first_step = time.perf_counter(), first_step
        self.board = self.bar = None
        if distributed.rank() == 0:
            keep_lines_before(run.metrics, first_step)
            self.bar = tqdm(total=plan.last_step, initial=first_step, unit="step", dynamic_ncols=True,
                            disable=not sys.stderr.isatty())
            from torch.utils.tensorboard import SummaryWriter  # 1 s that only training pays for

            self.board = SummaryWriter(str(run.path / "tensorboard"), purge_step=first_step)

    def add(self, terms, t: Tensor, num_timesteps: int) -> None:
        """Count one shard: LossTerms of (b,) and its steps t (b,)."""
        b = len(t)
        base = terms.base.detach().double()
        self.sums[:3] += torch.stack([terms.total.detach().sum(), base.sum(), terms.sequence.detach().sum()])
        quartile = t * QUARTILES // num_timesteps                                # (b,) in 0..3
        self.sums[3:3 + QUARTILES].index_add_(0, quartile, base)
        self.sums[3 + QUARTILES:3 + 2 * QUARTILES].index_add_(0, quartile, torch.ones_like(base))
        self.sums[-2] += b

    def step_done(self, step: int, grad_norm: Tensor) -> None:
        """``step`` counts completed steps."""
        self.sums[-1] += grad_norm.detach()
        if self.bar is not None:
            self.bar.update()

    def publish(self, step: int, lr: float) -> dict:
        """Means over all ranks since the last call, as a line of metrics.jsonl. Collective."""
        values = torch.tensor(distributed.gather_objects(self.sums.tolist()), dtype=torch.float64)   # (ranks, ...)
        grad_norm = float(values[0, -1])                                         # the same on all ranks
        values = values.sum(0).tolist()
        images = values[-2]
        elapsed, self.started = time.perf_counter() - self.started, time.perf_counter()
        line = {"step": step, "epoch": step // self.plan.steps_per_epoch, "loss": values[0] / images,
                "loss_base": values[1] / images, "loss_sequence": values[2] / images}
        sums, counts = values[3:3 + QUARTILES], values[3 + QUARTILES:3 + 2 * QUARTILES]
        line |= {f"loss_base_q{q + 1}": s / n if n else None for q, (s, n) in enumerate(zip(sums, counts, strict=True))}
        line |= {"grad_norm": grad_norm / (images / self.plan.global_batch), "lr": lr, "images_per_s": images / elapsed}
        if self.device.type == "cuda":
            line["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.sums.zero_()
        if self.bar is not None:
            self._write(line)
        return line

    def _write(self, line: dict) -> None:
        step = line["step"]
        with open(self.run.metrics, "a") as file:
            file.write(json.dumps(line) + "\n")
        for key, value in line.items():
            if key not in ("step", "epoch") and value is not None:
                self.board.add_scalar(key, value, step)
        self.bar.set_postfix_str(f"loss {line['loss']:.4g}, {line['images_per_s']:.0f} img/s")
        left = (self.plan.last_step - step) * self.plan.global_batch / line["images_per_s"]
        if self.bar.disable:
            log.info("step %d/%d  epoch %d  loss %.4g  %.1f images/s  %s left", step, self.plan.last_step,
                     line["epoch"], line["loss"], line["images_per_s"], tqdm.format_interval(left))

    def scalar(self, name: str, value: float, step: int) -> None:
        """One value beside the regular lines, such as a validation loss. Rank 0 only."""
        with open(self.run.metrics, "a") as file:
            file.write(json.dumps({"step": step, name: value}) + "\n")
        self.board.add_scalar(name, value, step)
        log.info("step %d  %s %.5g", step, name, value)

    def grid(self, images: Tensor, epoch: int, step: int) -> None:
        """Write samples/{epoch}.png from uint8 (N, C, H, W). Rank 0 only."""
        tiled = tile(images)
        save_png(tiled, self.run.path / "samples" / f"{epoch}.png")
        self.board.add_image("samples", tiled, step)

    def state(self) -> list:
        """What a checkpoint keeps, so that a resumed run logs the same means. Collective."""
        return distributed.gather_objects(self.sums.tolist())

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.board.close()


@contextmanager
def log_to_file(run: RunFolder):
    """Copy the log of this block to stdout.txt, and keep the progress bar whole. Rank 0 only."""
    if distributed.rank():
        yield
        return
    run.path.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(run.path / "stdout.txt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        with logging_redirect_tqdm() if sys.stderr.isatty() else nullcontext():
            yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def keep_lines_before(metrics: Path, step: int) -> None:
    """Drop the lines after ``step`` that a killed run wrote but whose weights were not saved."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:                           # the last line of a killed process may be cut
            continue
    write_text(metrics, "".join(kept))


def tile(images: Tensor, columns: int | None = None) -> Tensor:
    """uint8 (N, C, H, W) in rows of ``columns`` (default: as square as N allows), with a white gap of 2 pixels."""
    n, c, h, w = images.shape
    columns = columns or -(-n // max(1, int(n**0.5)))
    rows, gap = -(-n // columns), 2
    canvas = images.new_full((c, rows * (h + gap) - gap, columns * (w + gap) - gap), 255)
    for i, image in enumerate(images):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        canvas[:, top:top + h, left:left + w] = image
    return canvas


def save_png(image: Tensor, path: Path, durable: bool = True) -> None:
    """Write uint8 (C, H, W), C = 1 or 3, atomically."""
    array = image.permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    atomic_write(path, lambda file: picture.save(file, format="PNG"), durable)
