"""Full states go to disk from a background thread, whole or not at all."""

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor

import torch

from models.weights import weights_fingerprint, with_digest
from runners.training.checkpoint import RunFolder
from utils.atomic import atomic_path, atomic_write
from utils.errors import DivergedError, SaveError

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes states from a background thread, one at a time.

    A write that fails (a full disk) leaves the old files whole; it is logged, and training goes on. Files are written
    by rank 0; on the other ranks nothing happens.

    Args:
        run: Where to.
        keep_last, keep_every: Retention, see training.keep_last. Only snapshots that this run wrote are ever removed.
        snapshots: Epochs of the snapshots that this run has written so far.
    """

    def __init__(self, run: RunFolder, keep_last: int | None, keep_every: int | None, snapshots: list[int]):
        self.run, self.keep_last, self.keep_every = run, keep_last, keep_every
        self.snapshots, self.failure = snapshots, None
        self._thread, self._pending = ThreadPoolExecutor(1), None

    def save(self, state: dict, epoch: int | None = None) -> None:
        """Write ckpt.pth; with ``epoch`` also ckpt_{epoch}.pth and model_{epoch}_ema.pth."""
        self._wait()
        if epoch is not None and epoch not in self.snapshots:
            self.snapshots.append(epoch)
        state = to_host({**state, "snapshots": list(self.snapshots)})
        self._pending = self._thread.submit(self._write, state, epoch)

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self._thread.shutdown()                              # whatever happened, a write under way is finished

    def close(self) -> None:
        """Wait for the last write.

        Raises:
            SaveError: It failed.
        """
        self._wait()
        if self.failure:
            raise SaveError(f"the last checkpoint could not be saved: {self.failure}; free some space and resume")

    def _wait(self) -> None:
        if self._pending:
            self._pending.result()

    def _write(self, state: dict, epoch: int | None) -> None:
        state["digests"] = {key: weights_fingerprint(state[key]) for key in ("model", "ema") if state[key] is not None}
        try:
            path = self.run.path / "ckpt.pth"
            if epoch is None:
                atomic_write(path, lambda file: torch.save(state, file))
            else:            # a full state first: a first save can be resumed; ckpt.pth last: no snapshot is lost
                snapshot = self.run.path / f"ckpt_{epoch}.pth"
                atomic_write(snapshot, lambda file: torch.save(state, file))
                if state["ema"] is not None:
                    average = self.run.path / f"model_{epoch}_ema.pth"
                    weights = with_digest(state["ema"], state["digests"]["ema"])
                    atomic_write(average, lambda file: torch.save(weights, file))
                self._write_profiles(state, epoch)
                with atomic_path(path) as temporary:
                    shutil.copyfile(snapshot, temporary)
                self._remove_old(state["best_fid"])
            self.failure = None
            log.info("saved %s at step %d", path, state["step"])
        except (OSError, RuntimeError) as error:             # torch.save turns a full disk into a RuntimeError
            self.failure = error
            log.error("SAVING FAILED, training goes on with the old checkpoint: %s", error)

    def _write_profiles(self, state: dict, epoch: int) -> None:
        """phema_{epoch}_{length}.pth for each power-function average: what ``--ema_length`` makes others from."""
        averages = [state["ema"], *state["more_averages"].values()]
        for kind, average in zip(state["config"]["training"]["ema"], averages, strict=False):
            if kind["length"] is not None:
                content = {"step": state["step"], "length": kind["length"], "weights": average}
                path = self.run.path / f"phema_{epoch}_{kind['length']:.3f}.pth"
                atomic_write(path, lambda file, content=content: torch.save(content, file))

    def _remove_old(self, best: dict | None) -> None:
        if self.keep_last is None:
            return
        for epoch in self.snapshots[:-self.keep_last]:
            if epoch != (best and best["snapshot"]) and not (self.keep_every and epoch % self.keep_every == 0):
                self.snapshots.remove(epoch)
                for name in (f"ckpt_{epoch}.pth", f"model_{epoch}_ema.pth"):
                    (self.run.path / name).unlink(missing_ok=True)


def to_host(value):
    """A copy on the CPU of nested dictionaries and lists of tensors, which later steps cannot change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_host(item) for key, item in value.items()}
    return [to_host(item) for item in value] if isinstance(value, list) else value


def refuse_non_finite(state: dict) -> None:
    """DivergedError if a weight, an average or a moment is not finite."""
    moments = {f"{index} {name}": value for index, slots in state["optimizer"]["state"].items()
               for name, value in slots.items() if isinstance(value, torch.Tensor)}
    for kind, tensors in (("model weight", state["model"]), ("ema weight", state["ema"]), ("optimizer state", moments),
                          *((f"average ({name})", each) for name, each in state["more_averages"].items())):
        for name, tensor in (tensors or {}).items():
            if not torch.isfinite(tensor).all():
                raise DivergedError(f"{kind} {name} is not finite at step {state['step']}; nothing is saved, the last "
                                    "checkpoint is kept. Lower optim.lr, or set optim.grad_clip")
