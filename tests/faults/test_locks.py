"""Two jobs, one folder: the second is refused and changes nothing."""

import os
import signal
from functools import partial

import pytest

from tests.faults import jobs
from utils.errors import UserError
from utils.locks import lock_folder


def test_a_second_job_in_a_run_folder_is_refused(tmp_path):
    reached, released = jobs.SERVER.Event(), jobs.SERVER.Event()
    first = jobs.train(tmp_path, "--max_steps", "2", faults=jobs.hold_after(1, reached, released))
    assert reached.wait(jobs.PATIENCE), first.text
    before = jobs.files(tmp_path / "logs" / "digits")
    for flags in ([], ["--overwrite"], ["--resume_training"]):
        second = jobs.train(tmp_path, "--max_steps", "2", *flags)
        assert second.wait() == 2 and "in use by another job" in second.text, second.text
        assert second.text.count("\n") == 1
    assert jobs.files(tmp_path / "logs" / "digits") == before
    released.set()
    assert first.wait() == 0, first.text


def hold_in_generation(reached, released) -> None:
    from runners.sampling import generation

    original = generation.generate

    def generate(*args):
        jobs._hold(reached, released)
        return original(*args)

    generation.generate = generate


def test_a_second_job_in_an_image_folder_is_refused(exp):
    argv = ["--exp", str(exp), "--doc", "digits", "--device", "cpu", "--no-fid", "--timesteps", "2",
            "--num_samples", "2", "--verbose", "critical"]
    reached, released = jobs.SERVER.Event(), jobs.SERVER.Event()
    first = jobs.Job("generate", argv, faults=[partial(hold_in_generation, reached, released)])
    assert reached.wait(jobs.PATIENCE), first.text
    second = jobs.Job("generate", argv)
    assert second.wait() == 2 and "in use by another job" in second.text, second.text
    elsewhere = jobs.Job("generate", [*argv, "-i", "elsewhere"])
    assert elsewhere.wait() == 0, elsewhere.text
    released.set()
    assert first.wait() == 0, first.text
    assert len(list((exp / "image_samples" / "digits").glob("*.png"))) == 2


def test_a_lock_dies_with_its_job_although_forked_workers_live_on(tmp_path):
    """Data loader workers notice only after seconds that their parent is gone; a restarted rank must not wait."""
    said, say = jobs.SERVER.Pipe(duplex=False)
    job = jobs.SERVER.Process(target=_lock_and_fork, args=(tmp_path / "run", say))
    job.start()
    worker = said.recv()
    with pytest.raises(UserError, match="in use by another job"), lock_folder(tmp_path / "run"):
        pass
    job.kill()
    job.join()
    assert jobs.alive(worker)
    with lock_folder(tmp_path / "run"):
        os.kill(worker, signal.SIGKILL)


def _lock_and_fork(folder, say) -> None:
    with lock_folder(folder):
        worker = os.fork()
        if not worker:
            signal.pause()
        say.send(worker)
        signal.pause()
