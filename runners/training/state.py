"""What an optimizer step changes, and the optimizer step."""

import logging
import math

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from configs.schema import Config
from models import make_ema
from runners.training.optimizer import make_lr_schedule, make_optimizer
from utils.errors import DivergedError

log = logging.getLogger(__name__)


class TrainingState:
    """Weights, their average, moments, learning rate and loss scale.

    A step whose gradient is not finite is skipped: the weights and moments stay as they are, on all ranks alike,
    because they see the same averaged gradient. The decision is made on the device; the host looks at the count now
    and then.

    Args:
        model: The bare network on its device.
        config: Of the run.
        total_steps: Length of the learning rate schedule.
        loss_scaling: Scale the loss, as fp16 gradients need it.
    """

    def __init__(self, model: nn.Module, config: Config, total_steps: int, loss_scaling: bool = False):
        self.model, self.config = model, config
        self.parameters = list(model.parameters())
        device = self.parameters[0].device
        self.ema = make_ema(model, config.model.ema_rate, config.model.ema_warmup) if config.model.ema else None
        self.optimizer = make_optimizer(self.parameters, config.optim)
        self.lr_schedule = make_lr_schedule(self.optimizer, config.optim, total_steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=loss_scaling)
        self.bad_run = torch.zeros((), dtype=torch.long, device=device)         # skipped steps in a row, up to now
        self.longest_bad_run = self.bad_run.clone()                            # and the most since the last check

    @property
    def lr(self) -> float:
        return self.lr_schedule.get_last_lr()[0]

    def update(self) -> tuple[Tensor, Tensor]:
        """Clip the accumulated gradient and step.

        Returns:
            Its norm before clipping, and whether the step was skipped: () float and () bool, on the device.
        """
        self.scaler.unscale_(self.optimizer)
        grad_norm = clip_grad_norm_(self.parameters, self.config.optim.grad_clip or math.inf)
        bad = ~torch.isfinite(grad_norm)
        self._step_unless(bad)
        self.lr_schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.model)
        self.bad_run = (self.bad_run + 1) * bad
        self.longest_bad_run = torch.maximum(self.longest_bad_run, self.bad_run)
        return grad_norm, bad

    def _step_unless(self, bad: Tensor) -> None:
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = bad.float()          # what GradScaler does too: the kernel skips, nobody waits
            self.optimizer.step()
        elif not bad:
            self.optimizer.step()

    def check_divergence(self, step: int) -> None:
        """Waits for the device.

        Raises:
            DivergedError: training.max_bad_steps steps in a row were skipped.
        """
        longest, limit = int(self.longest_bad_run), self.config.training.max_bad_steps
        if longest >= limit:
            raise DivergedError(f"{longest} steps in a row up to step {step} had no finite gradient "
                                f"(training.max_bad_steps {limit}); the last checkpoint is kept. Lower optim.lr, set "
                                "optim.grad_clip, or look at the data")
        if longest:
            log.warning("up to %d steps in a row were skipped: their gradient was not finite", longest)
        self.longest_bad_run.zero_()

    def state_dict(self) -> dict:
        """Tensors and plain values only, names without prefixes."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None, "ema_updates": self.ema.updates if self.ema else 0,
            "optimizer": self.optimizer.state_dict(), "lr_schedule": self.lr_schedule.state_dict(),
            "grad_scaler": self.scaler.state_dict(), "bad_run": int(self.bad_run),
        }

    def _lay_out_moments(self) -> None:
        """Give moments the memory format of their weights: the file may come from a device that prefers another, and
        the fused kernels pair the elements of both as they lie in memory, without a word where that is wrong."""
        for parameter, moments in self.optimizer.state.items():
            for key, value in moments.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    moments[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state_dict()``; learning rate and other settings of the optimizer are those of this run."""
        self.model.load_state_dict(state["model"])
        if self.ema:                                        # a run that kept none starts one here
            self.ema.load_state_dict(state["ema"] or state["model"], state["ema_updates"])
        settings = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": settings})
        self._lay_out_moments()
        schedule, stored = self.lr_schedule, state["lr_schedule"]
        rates = [base * factor(stored["last_epoch"])
                 for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        schedule.load_state_dict(stored | {"base_lrs": schedule.base_lrs, "_last_lr": rates})
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if state["grad_scaler"]:                            # empty where the loss was not scaled
            self.scaler.load_state_dict(state["grad_scaler"])
        self.bad_run.fill_(state["bad_run"])
