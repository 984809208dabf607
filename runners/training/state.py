"""What an optimizer step changes, and the optimizer step."""

import logging
import math

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from configs.schema import Config
from functions.schedule import make_schedule
from functions.timesteps import TimeSampler
from models import EMA, decay_of
from models.trained import load_trained, trained
from runners.training.optimizer import make_lr_schedule, make_optimizer
from utils.errors import DivergedError

log = logging.getLogger(__name__)
REPLACED = 1e5                       # size of an infinite gradient under optim.replace_non_finite, as EDM has it


class TrainingState:
    """Weights, their averages, moments, learning rate, loss scale, and what draws the times of a batch.

    A step whose gradient is not finite is skipped: the weights and moments stay as they are, on all ranks alike,
    because they see the same averaged gradient. With the fused kernels (Adam, AdamW) the decision is made on the device
    and the host looks at the count now and then; with the other optimizers the host waits for it in each step. (SGD's
    fused kernel would leave its first momentum undefined where it skips.)

    Args:
        model: The bare network on its device.
        config: Of the run.
        total_steps: Length of the learning rate schedule.
        global_batch: Images of an optimizer step.
        loss_scaling: Scale the loss, as fp16 gradients need it.
    """

    def __init__(self, model: nn.Module, config: Config, total_steps: int, global_batch: int = 1,
                 loss_scaling: bool = False):
        self.model, self.config = model, config
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        device = self.parameters[0].device
        self.averages = [EMA(model, decay_of(average, global_batch)) for average in config.training.ema]
        self.times = TimeSampler.of(config, make_schedule(config.diffusion), device)
        self.optimizer = make_optimizer(self.parameters, config.optim)
        self.lr_schedule = make_lr_schedule(self.optimizer, config.optim, total_steps, global_batch)
        self.scaler = torch.amp.GradScaler(device.type, enabled=loss_scaling)
        self.last_lr = self.lr_schedule.get_last_lr()[0]                        # of the latest step
        self.bad_run = torch.zeros((), dtype=torch.long, device=device)         # skipped steps in a row, up to now
        self.longest_bad_run = self.bad_run.clone()                            # and the most since the last check

    @property
    def kinds(self):
        """What each average is, as the configuration has it."""
        return self.config.training.ema

    def update(self) -> tuple[Tensor, Tensor]:
        """Clip the accumulated gradient and step.

        Returns:
            Its norm before clipping, and whether the step was skipped: () float and () bool, on the device.
        """
        self.scaler.unscale_(self.optimizer)
        if self.config.optim.replace_non_finite and not self.scaler.is_enabled():     # that skips, and says so
            for parameter in self.parameters:
                if parameter.grad is not None:
                    torch.nan_to_num_(parameter.grad, 0.0, REPLACED, -REPLACED)
        grad_norm = clip_grad_norm_(self.parameters, self.config.optim.grad_clip or math.inf)
        bad = ~torch.isfinite(grad_norm)
        self._step_unless(bad)
        self.last_lr = self.lr_schedule.get_last_lr()[0]
        self.lr_schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        for average in self.averages:
            average.update(self.model)
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
            error = DivergedError(f"{longest} steps in a row up to step {step} had no finite gradient "
                                  f"(training.max_bad_steps {limit}); the last checkpoint is kept. Lower optim.lr, set "
                                  "optim.grad_clip, or look at the data")
            error.on_all_ranks = True                       # all see the same averaged gradient
            raise error
        if longest:
            log.warning("up to %d steps in a row were skipped: their gradient was not finite", longest)
        self.longest_bad_run.zero_()

    def state_dict(self) -> dict:
        """Tensors and plain values only, names without prefixes."""
        first, *more = self.averages or [None]
        return {
            "model": trained(self.model),
            "ema": first.state_dict() if first else None, "ema_updates": first.updates if first else 0,
            "averages": [str(kind) for kind in self.kinds],
            "more_averages": {str(kind): average.state_dict()
                              for kind, average in zip(self.kinds[1:], more, strict=True)},
            "times": self.times.state_dict(),
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
        """Continue from ``state_dict()``; learning rate and other settings of the optimizer are those of this run.

        What comes from a file has passed ``runners.training.resuming.Judge``.
        """
        load_trained(self.model, state["model"])
        names = [str(kind) for kind in self.kinds]
        for index, (kind, average) in enumerate(zip(self.kinds, self.averages, strict=True)):
            updates = state["step"] if kind.length else state["ema_updates"]        # a profile is over this run's time
            average.load_state_dict(stored_average(state, index, names) or state["model"], updates)
        self.times.load_state_dict(state.get("times", {}))
        settings = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": settings})
        self._lay_out_moments()
        self.resume_schedule(state["lr_schedule"]["last_epoch"])
        if state["grad_scaler"]:                            # empty where the loss was not scaled
            self.scaler.load_state_dict(state["grad_scaler"])
        self.bad_run.fill_(state["bad_run"])

    def resume_schedule(self, steps: int) -> None:
        """Set the learning rate to what this run's schedule has after ``steps`` steps."""
        schedule = self.lr_schedule
        rates = [base * factor(steps) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        schedule.load_state_dict(schedule.state_dict() | {"last_epoch": steps, "_step_count": steps + 1,
                                                          "_last_lr": rates})
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def stored_average(state: dict, index: int, names: list[str]) -> dict | None:
    """The weights in a full state that the average ``names[index]`` of a run goes on from; None: it is new, and begins
    with the run's weights as they are now. The run's first takes the state's first where no other average claims it."""
    first = next(iter(state.get("averages") or names))                      # an older file does not say
    if index == 0 and (names[0] == first or first not in names and names[0] not in state.get("more_averages", {})):
        return state.get("ema")
    return {first: state.get("ema"), **state.get("more_averages", {})}.get(names[index])
