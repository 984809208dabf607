import pytest
import torch

from datasets.order import batch_indices, steps_per_epoch
from utils.errors import DataError


def epoch(number, num_images=24, batch=8, seed=5):
    steps = steps_per_epoch(num_images, batch)
    return torch.cat([batch_indices(num_images, batch, number * steps + i, seed) for i in range(steps)])


def test_two_ranks_see_every_image_once():
    shards = [[], []]
    for step in range(steps_per_epoch(24, 8)):
        for rank, shard in enumerate(batch_indices(24, 8, step, 0).chunk(2)):
            shards[rank] += shard.tolist()
    assert not set(shards[0]) & set(shards[1])
    assert sorted(shards[0] + shards[1]) == list(range(24))


def test_position_follows_from_the_step_alone():
    undisturbed = [batch_indices(30, 7, step, 3) for step in range(40)]
    for step in (39, 0, 17):                                                    # after a resume, in any order
        assert torch.equal(batch_indices(30, 7, step, 3), undisturbed[step])


def test_epochs_and_seeds_differ_and_the_dropped_tail_changes():
    assert not torch.equal(epoch(0), epoch(1))
    assert not torch.equal(epoch(0), epoch(0, seed=6))
    tails = [set(range(30)) - set(epoch(e, 30, 8).tolist()) for e in range(4)]
    assert all(len(tail) == 6 for tail in tails) and len(set(map(frozenset, tails))) == 4


def test_order_is_the_same_for_ever():
    """Resuming with another version of a library must not change the order."""
    assert batch_indices(10, 5, 0, 1024).tolist() == GOLDEN[0]
    assert batch_indices(10, 5, 3, 1024).tolist() == GOLDEN[1]


def test_what_a_caller_does_to_its_indices_stays_with_it():
    before = batch_indices(10, 5, 0, 1).clone()
    batch_indices(10, 5, 0, 1).zero_()
    assert torch.equal(batch_indices(10, 5, 0, 1), before) and before.dtype == torch.long


def test_fewer_images_than_a_batch():
    assert steps_per_epoch(8, 8) == 1
    with pytest.raises(DataError, match="7 images, fewer than one global batch of 8; lower training.batch_size"):
        steps_per_epoch(7, 8)
    with pytest.raises(DataError):
        batch_indices(7, 8, 0, 0)


GOLDEN = [[4, 9, 8, 1, 3], [3, 7, 2, 6, 5]]
