"""Where curves and sample grids go beside metrics.jsonl: ``training.loggers``. Rank 0 only."""

import importlib.util
import logging
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from utils.atomic import write_text
from utils.errors import UserError

log = logging.getLogger(__name__)


class Logger(Protocol):
    """Made with the run's folder, the number of steps done before, and the whole configuration as plain values."""

    def scalar(self, name: str, value: float, step: int) -> None: ...

    def image(self, name: str, image: Tensor, step: int) -> None: ...        # uint8 (C, H, W)

    def close(self) -> None: ...


class TensorBoard:
    """Event files in tensorboard/. What a killed run drew after the step that is gone on from is hidden."""

    def __init__(self, folder: Path, first_step: int, config: dict):
        from torch.utils.tensorboard import SummaryWriter  # 1 s that only training pays for

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def scalar(self, name, value, step):
        self.writer.add_scalar(name, value, step)

    def image(self, name, image, step):
        self.writer.add_image(name, image, step)

    def close(self):
        self.writer.close()


class WandB:
    """Weights & Biases, one run for each folder, however often it is resumed; WANDB_MODE=offline needs no account."""

    def __init__(self, folder: Path, first_step: int, config: dict):
        import wandb

        self.wandb = wandb
        self.run = wandb.init(project="sa-ddim", name=folder.name, id=self._id(folder), dir=str(folder), config=config,
                              resume="allow")

    @staticmethod
    def _id(folder: Path) -> str:
        """Kept in the folder: a run begun anew, or in another place, under the same name is another one."""
        path = folder / "wandb_id.txt"
        if not path.exists():
            write_text(path, f"{secrets.token_hex(4)}\n")
        return path.read_text().strip()

    def scalar(self, name, value, step):
        self.run.log({name: value}, step=step)

    def image(self, name, image, step):
        self.run.log({name: self.wandb.Image(image.permute(1, 2, 0).squeeze(-1).cpu().numpy())}, step=step)

    def close(self):
        self.run.finish()


LOGGERS = {"tensorboard": TensorBoard, "wandb": WandB}


def check_loggers(names: Sequence[str]) -> None:
    """UserError for one whose package is not installed."""
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise UserError("training.loggers: wandb is not installed; pip install wandb, or leave it out of the list")
