"""Not-a-number in the loss, in a gradient, in the data, on one rank only: skipped, counted, stopped; never saved."""

import math
from functools import partial

import pytest
import torch

from tests.faults import jobs
from utils.errors import DivergedError


def poison(where: str, steps: list[int]) -> None:
    """Make the training steps ``steps`` (from 1) not finite."""
    from models.codecs import Pixels
    from runners.diffusion import Diffusion
    from runners.training import objective

    original, current = Diffusion.train_step, [0]

    def train_step(self, session):
        current[0] = session.step + 1
        if where == "gradient" and session.step == 0:
            session.state.parameters[3].register_hook(lambda g: g * math.inf if current[0] in steps else g)
        original(self, session)

    Diffusion.train_step = train_step
    if where == "loss":
        loss = objective.sequence_aware_loss
        objective.sequence_aware_loss = lambda *args, **kwargs: (
            terms := loss(*args, **kwargs))._replace(total=terms.total * (math.nan if current[0] in steps else 1))
    if where == "data":
        encode = Pixels.encode
        Pixels.encode = lambda *args: encode(*args) * (math.nan if current[0] in steps else 1)


def finite(exp) -> bool:
    state = jobs.state(exp)
    moments = [slot for slots in state["optimizer"]["state"].values() for slot in slots.values()]
    return all(torch.isfinite(t).all() for t in [*state["model"].values(), *state["ema"].values(), *moments])


@pytest.mark.parametrize("where", ["loss", "gradient", "data"])
def test_isolated_bad_steps_are_skipped_and_many_in_a_row_end_the_run(tmp_path, where):
    flags = ["--training.max_bad_steps", "3", *jobs.EVERY_TWO, "--verbose", "warning"]
    some = jobs.train(tmp_path / "some", "--training.max_steps", "8", *flags,
                      faults=[partial(poison, where, [1, 3, 4, 6])])
    many = jobs.train(tmp_path / "many", "--training.max_steps", "12", *flags,
                      faults=[partial(poison, where, [4, *range(6, 13)])])
    assert some.wait() == 0, some.text
    assert finite(tmp_path / "some") and jobs.state(tmp_path / "some")["step"] == 8
    assert [line["skipped_steps"] for line in jobs.metrics(tmp_path / "some")] == [1, 0, 1, 1, 0, 1, 0, 0]
    assert many.wait() == 4 and "Traceback" not in many.text, many.text
    assert "3 steps in a row" in many.text and "training.max_bad_steps 3" in many.text
    assert finite(tmp_path / "many") and jobs.state(tmp_path / "many")["step"] <= 8


def test_one_bad_rank_stops_all_with_4(tmp_path):
    """Gradients are averaged, so every rank skips the same steps."""
    flags = ["--training.max_steps", "8", "--training.max_bad_steps", "2", *jobs.EVERY_TWO]
    ranks = jobs.train_ranks(tmp_path, 2, *flags, faults={1: [partial(poison, "loss", [2, 5, 6, 7])]})
    assert [job.wait() for job in ranks] == [4, 4], [job.text for job in ranks]
    assert "2 steps in a row" in ranks[0].text and ranks[1].text == ""
    assert [line["skipped_steps"] for line in jobs.metrics(tmp_path)] == [0, 1, 0, 0, 1, 1]
    assert finite(tmp_path) and jobs.state(tmp_path)["step"] == 4


def measure_simply(breaks: bool) -> None:
    """An FID without Inception; where it ``breaks``, this rank's images are not finite."""
    from runners.distributed import barrier
    from runners.evaluation import references
    from runners.sampling.sampler import Sampler
    from runners.training import periodic_fid

    class Evaluation:
        def __init__(self, *given):
            pass

        def update(self, images, positions):
            pass

        def results(self):
            barrier()
            return {"fid": 1.0, "name": "FID-4"}

    def diverge(self, seeds):
        raise DivergedError(f"seeds {seeds}")

    references.find_reference = periodic_fid.find_reference = lambda *given, **more: None
    periodic_fid.load_inception, periodic_fid.Evaluation = (lambda **given: None), Evaluation
    if breaks:
        Sampler.__call__ = diverge


def test_an_fid_of_a_chain_that_diverges_on_one_rank_is_left_out_and_training_goes_on(tmp_path):
    flags = ["--training.batch_size", "256", "--training.n_epochs", "2", "--training.snapshot_freq", "1",
             "--training.fid_freq", "1", "--training.fid_num", "4", "--sampling.batch_size", "2", "--verbose",
             "warning"]
    ranks = jobs.train_ranks(tmp_path, 2, *flags,
                             faults={rank: [partial(measure_simply, rank == 1)] for rank in range(2)})
    assert [job.wait() for job in ranks] == [0, 0], [job.text for job in ranks]
    assert "no FID at step 3: seeds [2, 3]" in ranks[0].text and "no FID at step 6" in ranks[0].text
    assert jobs.state(tmp_path)["step"] == 6 and jobs.state(tmp_path)["best_fid"] is None


def overflow() -> None:
    """Weights that leave float32 although every gradient was finite."""
    from runners.training.state import TrainingState

    original = TrainingState.update

    def update(self):
        result = original(self)
        with torch.no_grad():
            self.parameters[0].mul_(math.inf)
        return result

    TrainingState.update = update


def test_nothing_that_is_not_finite_is_saved(tmp_path):
    ranks = jobs.train_ranks(tmp_path, 2, "--training.max_steps", "1", faults={0: [overflow], 1: [overflow]})
    assert [job.wait() for job in ranks] == [4, 4], [job.text for job in ranks]
    assert "is not finite at step 1; nothing is saved" in ranks[0].text and ranks[1].text == ""
    assert not list((tmp_path / "logs" / "digits").glob("*.pth"))
