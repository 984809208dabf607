"""What a training run shows: metrics.jsonl, curves, the log file, the progress bar, sample grids."""

import json
import logging
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from runners import distributed
from runners.training.checkpoint import RunFolder
from runners.training.loggers import LOGGERS
from runners.training.metrics_file import read_metrics
from utils.atomic import write_text
from utils.files import open_append
from utils.png import save_png
from utils.text import LineFormatter

log = logging.getLogger(__name__)
LOSSES = ("loss", "loss_base", "loss_sequence", "loss_bits")         # the last only with a variational bound
QUARTILES = 4
SPIKE, HISTORY = 3.0, 20                             # a loss this many times the median of the last lines is a spike


class Monitor:
    """Sums the losses of a logging interval on the device and publishes their means; only rank 0 writes.

    Nothing here waits for the device between logging points.
    """

    def __init__(self, run: RunFolder, plan, device: torch.device, first_step: int, sums: list | None = None,
                 has_bits: bool = False, loggers: Sequence[str] = ("tensorboard",), config: dict | None = None):
        self.run, self.plan, self.device, self.has_bits = run, plan, device, has_bits
        self.sums = torch.zeros(len(LOSSES) + 2 * QUARTILES + 4, dtype=torch.float64, device=device)
        if sums is not None:                         # the part of an interval that a resumed run had already seen
            mine = sums[distributed.rank()] if len(sums) == plan.world_size else []
            if len(mine) == len(self.sums):          # else of a version with fewer losses
                self.sums += torch.tensor(mine, dtype=torch.float64, device=device)
        self.started, self.steps_timed = time.perf_counter(), 0
        self.loggers, self.bar = [], None
        if distributed.rank() == 0:
            self.history = deque(keep_lines_before(run.metrics, first_step), maxlen=HISTORY)
            self.bar = tqdm(total=plan.last_step, initial=first_step, unit="step", dynamic_ncols=True,
                            disable=not sys.stderr.isatty())
            self.loggers = [LOGGERS[name](run.path, first_step, config or {}) for name in loggers]

    def add(self, terms, ranks: Tensor) -> None:
        """Count one shard: LossTerms of (b,) and the ranks of its times, in [0, 1), (b,).

        Images without a finite loss are left out.
        """
        bits = torch.zeros_like(terms.total) if terms.bits is None else terms.bits
        losses = torch.stack([terms.total, terms.base, terms.sequence, bits]).detach().double() # (4, b)
        finite = losses.isfinite().all(0)                                                       # (b,)
        losses = torch.where(finite, losses, 0)
        quartile = (ranks * QUARTILES).long()                                                   # (b,) in 0..3
        sums, quartiles = self.sums[:len(LOSSES)], self.sums[len(LOSSES):-4].view(2, QUARTILES)
        sums += losses.sum(1)
        quartiles[0].index_add_(0, quartile, losses[1])
        quartiles[1].index_add_(0, quartile, finite.double())
        self.sums[-4] += finite.sum()

    def step_done(self, grad_norm: Tensor, bad: Tensor) -> None:
        """Count one step: norm of its gradient and whether it was skipped, () each."""
        self.sums[-3] += torch.where(bad, 0, grad_norm.detach())
        self.sums[-2] += 1
        self.sums[-1] += bad
        self.steps_timed += 1
        if self.bar is not None:
            self.bar.update()

    @contextmanager
    def paused(self):
        """The time of this block is not training time: pictures, validation, FID."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)      # steps that are still under way belong to the time before
        before = time.perf_counter()
        try:
            yield
        finally:
            self.started += time.perf_counter() - before

    def publish(self, step: int, lr: float) -> dict:
        """Means over all ranks since the last call, as a line of metrics.jsonl. Collective."""
        values = torch.tensor(distributed.gather_objects(self.sums.tolist()), dtype=torch.float64)   # (ranks, ...)
        grad_norm, steps, bad = values[0, -3:].tolist()                          # the same on all ranks
        *values, images = values[:, :-3].sum(0).tolist()
        elapsed, self.started = time.perf_counter() - self.started, time.perf_counter()
        line = {"step": step, "epoch": step // self.plan.steps_per_epoch}
        line |= {name: _mean(value, images) for name, value in zip(LOSSES, values, strict=False)}
        if not self.has_bits:
            del line["loss_bits"]
        sums, counts = values[len(LOSSES):len(LOSSES) + QUARTILES], values[len(LOSSES) + QUARTILES:]
        line |= {f"loss_base_q{q + 1}": _mean(s, n) for q, (s, n) in enumerate(zip(sums, counts, strict=True))}
        line |= {"grad_norm": _mean(grad_norm, steps - bad), "lr": lr, "skipped_steps": int(bad),
                 "images_per_s": self.steps_timed * self.plan.global_batch / elapsed}
        if self.device.type == "cuda":
            line["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.sums.zero_()
        self.steps_timed = 0
        if self.bar is not None:
            self._write(line)
        return line

    def _write(self, line: dict) -> None:
        step = line["step"]
        self._warn_of_spikes(line)
        self._record(line)
        loss = "none finite" if line["loss"] is None else f"{line['loss']:.4g}"
        self.bar.set_postfix_str(f"loss {loss}, {line['images_per_s']:.0f} img/s")
        left = (self.plan.last_step - step) * self.plan.global_batch / line["images_per_s"]
        if self.bar.disable:
            log.info("step %d/%d  epoch %d  loss %s  %.1f images/s  %s left", step, self.plan.last_step, line["epoch"],
                     loss, line["images_per_s"], tqdm.format_interval(left))

    def _record(self, line: dict) -> None:
        """Append to metrics.jsonl and draw the curves; without room on the disk training goes on."""
        with self._despite_full_disk():
            with open_append(self.run.metrics) as file:
                file.write(json.dumps(line) + "\n")
            for key, value in line.items():
                if key not in ("step", "epoch", "spikes") and value is not None:
                    for logger in self.loggers:
                        logger.scalar(key, value, line["step"])

    @contextmanager
    def _despite_full_disk(self):
        try:
            yield
        except OSError as error:
            log.error("metrics or samples could not be written: %s", error)

    def _warn_of_spikes(self, line: dict) -> None:
        """Name what jumped, in the line and in the log; measured by the lines before, also those of an earlier job."""
        spikes = []
        for key in ("loss", "grad_norm"):
            before = [old[key] for old in self.history if old.get(key) is not None]
            if len(before) >= 5 and line[key] is not None and line[key] > SPIKE * statistics.median(before):
                spikes.append(key)
                log.warning("step %d: %s is %.4g, the median of the last %d lines %.4g", line["step"], key, line[key],
                            len(before), statistics.median(before))
        if spikes:
            line["spikes"] = spikes
        self.history.append(line)

    def scalar(self, name: str, value: float, step: int, told: bool = False) -> None:
        """One value beside the regular lines, such as a validation loss; ``told``: not in the log. Rank 0 only."""
        self._record({"step": step, name: value})
        if not told:
            log.info("step %d  %s %.5g", step, name, value)

    def grid(self, sheet: Tensor, step: int) -> None:
        """Write samples/{step}.png, a picture of uint8 (C, H, W). Rank 0 only."""
        with self._despite_full_disk():
            save_png(sheet, self.run.path / "samples" / f"{step:07d}.png")
            for logger in self.loggers:
                logger.image("samples", sheet, step)

    def state(self) -> list:
        """What a checkpoint keeps, so that a resumed run logs the same means. Collective."""
        return distributed.gather_objects(self.sums.tolist())

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            with self._despite_full_disk():
                for logger in self.loggers:
                    logger.close()


class _LogFile(logging.FileHandler):
    """A full disk costs lines of the file, not the run."""

    def _open(self):
        return open_append(self.baseFilename)

    def handleError(self, record):
        pass

    def close(self):
        with suppress(OSError):
            super().close()


@contextmanager
def log_to_file(run: RunFolder):
    """Copy the log of this block to stdout.txt, and keep the progress bar whole. Rank 0 only."""
    if distributed.rank():
        yield
        return
    run.path.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(run.path / "stdout.txt")
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    if run.comment:
        log.info("comment: %s", run.comment)
    try:
        with logging_redirect_tqdm() if sys.stderr.isatty() else nullcontext():
            yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def keep_lines_before(metrics: Path, step: int) -> list[dict]:
    """Drop lines after ``step``, which a killed run wrote without saving its weights; returns the regular ones."""
    if not metrics.exists():
        return []
    kept = [line for line in read_metrics(metrics) if line["step"] <= step]
    write_text(metrics, "".join(json.dumps(line) + "\n" for line in kept))
    return [line for line in kept if "loss" in line]


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None
