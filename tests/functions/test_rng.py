import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functions.rng import SeededNoise, check_seeds, derive_seed, parse_seeds, seeded, shard_generator, slerp


@pytest.mark.parametrize(("text", "seeds"), [
    ("0-3", [0, 1, 2, 3]), ("1,2,5-7", [1, 2, 5, 6, 7]), ("7", [7]), (" 3 , 1-2", [3, 1, 2]), ("007", [7])])
def test_parse_seeds(text, seeds):
    found = parse_seeds(text)
    assert found == seeds and list(found) == seeds and len(found) == len(seeds)
    assert [found[i] for i in range(len(seeds))] == seeds and found[-1] == seeds[-1]
    for first, last, step in ((0, 2, 1), (1, None, 1), (None, -1, 1), (None, None, -1), (2, 1, 1)):
        assert list(found[first:last:step]) == seeds[first:last:step]
    assert parse_seeds(str(found)) == seeds


def test_ranges_stay_ranges():
    tracemalloc.start()
    seeds = parse_seeds("7,100-4294967295")
    assert len(seeds) == 2**32 - 99 and seeds[-1] == 2**32 - 1 and 99 not in seeds and 5000 in seeds
    assert list(seeds[1000:1003]) == [1099, 1100, 1101] and list(seeds[:3]) == [7, 100, 101]
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@pytest.mark.parametrize("text", ["4294967296", "0-99999999999", "9" * 60_000, "0-" + "9" * 5000])
def test_seeds_beyond_the_last_are_refused(text):
    with pytest.raises(ValueError, match="beyond the last seed, 4294967295") as error:
        parse_seeds(text)
    assert len(str(error.value)) < 300


def test_seeds_that_meet_are_given_twice():
    with pytest.raises(ValueError, match="1000000 is given twice"):
        parse_seeds("1000000,5-4000000000")


@pytest.mark.parametrize("text", ["", "5-1", "1,1", "0-3,2", "-1", "a", "1-", "1,,2", "1.5"])
def test_parse_seeds_refuses(text):
    with pytest.raises(ValueError, match="seeds"):
        parse_seeds(text)


@pytest.mark.parametrize(("seeds", "message"), [
    ([-1], "seed -1: seeds are 0 to 4294967295"), ([3, 1, 3], "seed 3 is given twice"), ([2**32], "seed 4294967296: "),
    (range(10**12), "seed 999999999999: "), (range(4, -2, -1), "seed -1: "), ([0.5], "whole numbers"),
    (5, "such as range"), (["1"], "whole numbers"), (torch.tensor([1, 1]), "seed 1 is given twice")])
def test_seeds_from_python_are_checked(seeds, message):
    with pytest.raises(ValueError, match=message):
        check_seeds(seeds)


def test_seeds_from_python_stay_what_they_are():
    for seeds in (range(2**32), range(9, -1, -3), range(0), [], [7, 0], parse_seeds("5,6000-4000000")):
        assert check_seeds(seeds) == seeds and type(check_seeds(seeds)) is type(seeds)
    assert check_seeds(np.array([4, 2])) == check_seeds(torch.tensor([4, 2])) == [4, 2]


@given(st.lists(st.integers(0, 50), unique=True, min_size=1))
def test_parse_seeds_round_trip(seeds):
    assert parse_seeds(",".join(map(str, seeds))) == seeds


def test_an_image_has_the_same_noise_in_any_batch():
    together = SeededNoise([3, 2**32 + 5, 9])
    first, second = together.randn((3, 1, 2, 2)), together.randn((3, 1, 2, 2))
    for row, seed in enumerate([3, 5, 9]):                                          # seeds count modulo 2^32
        alone, generator = SeededNoise([seed]), torch.Generator().manual_seed(seed)
        for draw in (first, second):
            assert torch.equal(alone.randn((1, 1, 2, 2))[0], draw[row])
            assert torch.equal(torch.randn((1, 2, 2), generator=generator), draw[row])


def test_a_wrong_batch_is_refused():
    with pytest.raises(ValueError, match="2 seeds"):
        SeededNoise([0, 1]).randn((3, 1, 2, 2))


def test_shards_have_their_own_repeatable_streams():
    def draw(*key):
        generator = shard_generator(*key)
        return torch.cat([torch.randn(4, generator=generator), torch.rand(4)])      # own stream, then dropout's

    streams = {key: draw(*key) for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]}
    assert all(torch.equal(draw(*key), stream) for key, stream in streams.items())
    values = torch.stack(list(streams.values()))
    assert len(values[:, 0].unique()) == len(values[:, 4].unique()) == 4


def test_seeded_leaves_the_callers_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with seeded(1):
        inside = torch.rand(1)
    assert torch.equal(torch.rand(1), expected)
    with seeded(1):
        assert torch.equal(torch.rand(1), inside)


def test_derived_seeds_fit_and_differ():
    seeds = {derive_seed(0, step, shard) for step in range(50) for shard in range(4)}
    assert len(seeds) == 200 and all(0 <= s < 2**63 for s in seeds)


def test_slerp_runs_along_the_circle():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, b, 0.5), torch.tensor([0.5, 0.5]).sqrt())
