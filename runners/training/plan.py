"""How a global batch is cut into processes and network calls, and how many steps a run has."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from configs.schema import Training
from datasets.order import batch_indices, steps_per_epoch
from utils.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run.

    The global batch of a step is cut into ``world_size * accumulate`` shards of ``micro_batch`` images; shard s goes
    through the network of rank s // accumulate. Noise belongs to the shard, so the same number of shards gives the
    same run for any number of processes.
    """

    num_images: int
    world_size: int
    rank: int
    micro_batch: int                 # images in one network call
    accumulate: int                  # network calls in one step on this process
    total_steps: int                 # where the learning rate schedule and the run end
    last_step: int                   # where this call ends
    seed: int

    @classmethod
    def make(cls, training: Training, num_images: int, world_size: int = 1, rank: int = 0,
             max_steps: int | None = None) -> "Plan":
        """
        Args:
            num_images: Training images.
            max_steps: Ends this call early, without changing the schedule of the run.

        Raises:
            UserError: A batch that does not divide.
            DataError: Fewer images than one global batch.
        """
        process_batch, micro_batch, accumulate = split_batch(training, world_size)
        total = training.n_epochs * steps_per_epoch(num_images, process_batch * world_size)
        if training.total_images:
            total = -(-training.total_images // (process_batch * world_size))
        total = min(total, training.max_steps or total)
        return cls(num_images, world_size, rank, micro_batch, accumulate, total, min(total, max_steps or total),
                   training.seed)

    def say_where_it_ends(self, training: Training, max_steps: int | None) -> None:
        """Which of several limits counts; one line in the log where the caller gave one that is not the run's end."""
        if max_steps and max_steps < self.total_steps:
            log.info("this call ends at step %d; the run and its learning rate schedule end at step %d",
                     max_steps, self.total_steps)
        elif max_steps and max_steps > self.total_steps:
            limit = "training.max_steps" if self.total_steps == training.max_steps else \
                f"training.{training.limit} {getattr(training, training.limit)}"
            log.info("--max_steps %d is beyond the run, which %s ends at step %d", max_steps, limit, self.total_steps)

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulate * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.num_images, self.global_batch)

    def snapshot(self, step: int, training: Training) -> int | None:
        """Id of the snapshot to take after ``step`` steps: completed epochs, or steps where snapshot_freq counts those.

        Every snapshot_freq of them, with every FID, and at the end of this call if it ends there; else None.
        """
        unit = self.steps_per_epoch if training.snapshot_unit == "epochs" else 1
        count, rest = divmod(step, unit)
        due = count % training.snapshot_freq == 0 or self.fid_due(step, training) or step == self.last_step
        return count if due and not rest else None

    def fid_due(self, step: int, training: Training) -> bool:
        return training.fid_freq > 0 and step % (training.fid_freq * self.steps_per_epoch) == 0

    def shards(self) -> range:
        """Indices of this rank's shards."""
        return range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate)

    def index_lists(self, first_step: int) -> Iterator[Tensor]:
        """Image indices (micro_batch,) of this rank's network calls, from ``first_step`` to the last."""
        for step in range(first_step, self.last_step):
            indices = batch_indices(self.num_images, self.global_batch, step, self.seed)
            for shard in self.shards():
                yield indices[shard * self.micro_batch:(shard + 1) * self.micro_batch]


def split_batch(training: Training, world_size: int) -> tuple[int, int, int]:
    """(images of a process, images of a network call, network calls) for each step.

    Raises:
        UserError: Something does not divide.
    """
    process_batch = training.batch_size
    if training.global_batch_size:
        process_batch, rest = divmod(training.global_batch_size, world_size)
        if rest or not process_batch:
            raise UserError(f"training.global_batch_size {training.global_batch_size} cannot be split over "
                            f"{world_size} processes; choose a multiple of {world_size}")
    micro_batch = training.micro_batch_size or process_batch
    accumulate, rest = divmod(process_batch, micro_batch)
    if rest or not accumulate:
        raise UserError(f"training.micro_batch_size {micro_batch} does not divide the {process_batch} images of a "
                        "process")
    return process_batch, micro_batch, accumulate
