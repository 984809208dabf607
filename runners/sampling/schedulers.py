"""Chains of diffusers: every scheduler of that library that can walk the chain of a network here.

A scheduler sees the noise that the denoiser predicts (guided, and divided by epsilon scaling); of networks that predict
something else it sees v, which exists where the chain starts from pure noise too. Some schedulers move y = x / alpha:
they scale their input themselves, so that the network sees x as ever.
"""

import difflib
import inspect

import torch
from torch import Tensor

from configs.sampling import FOREIGN, SamplerSettings
from functions.chain import Chain
from functions.prediction import PREDICTIONS
from utils.errors import UserError
from utils.hub import needs_package

SPACINGS = {None: None, "uniform": "leading", "leading": "leading", "linspace": "linspace", "trailing": "trailing"}
GIVEN_TO_STEP = {"self", "model_output", "timestep", "sample"}


class SchedulerChain:
    """A scheduler of diffusers, ``diffusers:CLASS``.

    Args:
        settings: SamplerSettings.
        schedule: DiscreteSchedule.
        prediction: Of the network; None where only the times are asked for.

    Attributes:
        times: The distinct times that it visits, ascending.

    Raises:
        UserError: No such class, a chain that it cannot walk, or one that needs more than a network's output.
    """

    def __init__(self, settings: SamplerSettings, schedule, prediction=None):
        self.name = settings.sample_type.removeprefix(FOREIGN)
        self.schedule, self.eta = schedule, settings.eta
        if not hasattr(schedule, "num_timesteps"):
            raise UserError(f"--sample_type {settings.sample_type}: diffusers' schedulers walk discrete schedules; "
                            "this network has a continuous one")
        if settings.skip_type not in SPACINGS:
            raise UserError(f"--skip_type {settings.skip_type}: diffusers' schedulers know leading, linspace, trailing")
        if not isinstance(settings.timesteps, int):
            raise UserError(f"--timesteps {settings.timesteps}: diffusers' schedulers take a number of steps")
        self.kind, self.steps = scheduler_class(self.name), settings.timesteps
        self.takes_eps = prediction in (None, PREDICTIONS["epsilon"])
        self.spacing = SPACINGS[settings.skip_type] or SPACINGS.get(schedule.skip_type) or "leading"
        self.step_takes = inspect.signature(self.kind.step).parameters
        if self.eta and "eta" not in self.step_takes:
            raise UserError(f"--eta {self.eta:g}: {self.name} takes none")
        self.times = self._whole_times(self._scheduler().timesteps.tolist())

    def _scheduler(self):
        """A fresh one at the start of its chain: they count their steps."""
        schedule = self.schedule
        wanted = {
            "num_train_timesteps": schedule.num_timesteps, "trained_betas": schedule.betas,
            "prediction_type": "epsilon" if self.takes_eps else "v_prediction", "clip_sample": False,
            "set_alpha_to_one": schedule.alpha(schedule.end) == 1, "steps_offset": schedule.steps_offset,
            "timestep_spacing": self.spacing, "rescale_betas_zero_snr": schedule.betas[-1] == 1}
        known = inspect.signature(self.kind.__init__).parameters
        try:
            made = self.kind(**{key: value for key, value in wanted.items() if key in known})
            made.set_timesteps(self.steps)
        except Exception as error:            # ImportError, ValueError, NotImplementedError, ...: their own refusals
            raise self._refusal(error) from None
        return made

    def _refusal(self, error: Exception) -> UserError:
        return UserError(f"--sample_type {FOREIGN}{self.name} does not work here: {' '.join(str(error).split())[:250]}")

    def _whole_times(self, visited: list[float]) -> list[int]:
        if any(t != int(t) for t in visited):
            raise UserError(f"{self.name} visits times between the steps of the chain with --skip_type {self.spacing}; "
                            "use leading or trailing")
        if visited != sorted(visited, reverse=True):
            raise UserError(f"--sample_type {FOREIGN}{self.name}: it does not run from noise to an image")
        return sorted({int(t) for t in visited})

    def calls(self) -> int:
        """Network calls for each image, without guidance."""
        return len(self._scheduler().timesteps)

    @torch.no_grad()
    def __call__(self, denoiser, x: Tensor, noise, *, eps_scaler=None, clip_denoised: bool = False,
                 callback=None, start=None, eta: float = 0.0) -> Tensor:
        """The sample from ``x`` at the highest time; ``noise`` (SeededNoise) gives the draws of its steps.

        Epsilon scaling and clipping happen before the scheduler sees the network's output.
        """
        if start not in (None, self.times[-1]):
            raise UserError(f"--sample_type {FOREIGN}{self.name}: diffusers' schedulers cannot be entered half-way; "
                            "measure with a sampler of this program")
        chain = Chain(denoiser, self.times, eps_scaler, clip_denoised, callback=callback)
        links = {link.i: link for link in chain.links()}
        scheduler, seen = self._scheduler(), set()
        options = {key: value for key, value in (("eta", eta), ("generator", noise.generators))
                   if key in self.step_takes}
        y = x * float(scheduler.init_noise_sigma)
        for t in scheduler.timesteps:
            link, x = links[int(t)], scheduler.scale_model_input(y, t)
            look = chain.estimate(x, link.i, link.scale) if link.i in seen else chain.look(x, link)
            seen.add(link.i)
            try:
                y = scheduler.step(self._output(look, link.i), t, y, return_dict=False, **options)[0]
            except (ValueError, TypeError, NotImplementedError, ImportError) as error:
                raise self._refusal(error) from None
        return y

    def _output(self, estimate, t: int) -> Tensor:
        if self.takes_eps:
            return estimate.eps
        return self.schedule.alpha(t) * estimate.eps - self.schedule.sigma(t) * estimate.x0


def scheduler_class(name: str) -> type:
    """A class of diffusers that walks a chain of betas with nothing but a network's output.

    Raises:
        UserError: Unknown, with names that are near; or another kind of scheduler.
    """
    try:
        import diffusers
    except ImportError as error:
        raise needs_package(error, f"--sample_type {FOREIGN}{name}") from None
    names = [each for each in dir(diffusers) if each.endswith("Scheduler") and not each.startswith("Flax")]
    if name not in names:
        begin = name.removesuffix("Scheduler").lower()
        close = [each for each in names if each.lower().startswith(begin)] + difflib.get_close_matches(
            name, names, n=3) or ["DDIMScheduler", "UniPCMultistepScheduler"]
        raise UserError(f"--sample_type {FOREIGN}{name}: diffusers has no scheduler of that name; did you mean "
                        f"{', '.join(dict.fromkeys(close[:4]))}?")
    kind = getattr(diffusers, name)
    missing = {"trained_betas", "prediction_type"} - inspect.signature(kind.__init__).parameters.keys()
    if missing or not hasattr(kind, "step"):
        raise UserError(f"--sample_type {FOREIGN}{name}: not a scheduler of a chain of betas (it takes no "
                        f"{' and no '.join(sorted(missing)) or 'step'})")
    parameters = inspect.signature(kind.step).parameters.values()
    needs = [each.name for each in parameters if each.default is each.empty and each.name not in GIVEN_TO_STEP
             and each.kind is not each.VAR_KEYWORD]
    if needs:
        raise UserError(f"--sample_type {FOREIGN}{name}: its step needs {', '.join(needs)}, which a chain does not "
                        "have")
    return kind
