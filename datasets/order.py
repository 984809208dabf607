"""Which images a training step sees: a function of (seed, step) alone, so that nothing has to be saved to resume.

An epoch is one permutation of all images, cut into global batches. The tail that does not fill a batch is dropped
(``drop_last``): every image is seen at most once in an epoch, and another tail is left out in the next.
"""

from functools import lru_cache

import numpy as np
import torch

from utils.errors import DataError


def steps_per_epoch(num_images: int, global_batch: int) -> int:
    """Full global batches in one pass over the data.

    Raises:
        DataError: Fewer images than one global batch.
    """
    if num_images < global_batch:
        raise DataError(f"the data set has {num_images} images, fewer than one global batch of {global_batch}; "
                        f"lower training.batch_size (or training.global_batch_size) to at most {num_images} over all "
                        "processes, or use more data")
    return num_images // global_batch


def batch_indices(num_images: int, global_batch: int, step: int, seed: int) -> torch.Tensor:
    """Images of global step ``step`` (from 0), for all ranks together; a rank takes its slice.

    Returns:
        long, (global_batch,), distinct, in [0, num_images).

    Raises:
        DataError: As ``steps_per_epoch``.
    """
    epoch, position = divmod(step, steps_per_epoch(num_images, global_batch))
    start = position * global_batch
    return _permutation(num_images, seed, epoch)[start:start + global_batch].clone()


@lru_cache(maxsize=3)
def _permutation(num_images: int, seed: int, epoch: int) -> torch.Tensor:
    """long, (num_images,). RandomState, because numpy promises never to change its stream."""
    state = np.random.SeedSequence((seed, epoch)).generate_state(4)
    return torch.from_numpy(np.random.RandomState(state).permutation(num_images))
