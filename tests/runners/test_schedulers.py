"""diffusers' schedulers as samplers of our networks, against our own where both exist."""

import pytest
import torch

from configs.sampling import SamplerSettings
from configs.schema import Config
from functions.denoiser import Denoiser
from functions.denoising import SAMPLERS
from functions.rng import SeededNoise
from functions.schedule import make_schedule
from functions.timesteps import sampling_times
from runners.sampling.schedulers import SchedulerChain
from utils.errors import UserError


@pytest.fixture
def denoiser(golden_unet):
    config = Config.model_validate({"data": {"dataset": "ZIP", "image_size": 16}, "model": {}})
    return Denoiser(lambda x, t: golden_unet(x, t), make_schedule(config.diffusion))


def sample(denoiser, name, seeds=(0, 1), **settings):
    options = {key: settings.pop(key) for key in ("eps_scaler", "callback") if key in settings}
    wanted, noise = SamplerSettings(sample_type=name, **settings), SeededNoise(list(seeds))
    x = noise.randn((len(seeds), 3, 16, 16))
    options |= {"eta": wanted.eta} if wanted.eta else {}
    if name in SAMPLERS:
        times = sampling_times(denoiser.schedule, wanted.timesteps, wanted.skip_type)
        return SAMPLERS[name](denoiser, x, times, noise_fn=lambda index: noise.randn(x.shape), **options), times
    chain = SchedulerChain(wanted, denoiser.schedule, denoiser.prediction)
    return chain(denoiser, x, noise, **options), chain.times


def close(a, b):
    assert (a - b).abs().max() <= 1e-4 * b.abs().mean()


@pytest.mark.parametrize("settings", [{"skip_type": "leading"}, {"skip_type": "trailing"}, {"eta": 0.7},
                                      {"eps_scaler": (0.002, 1.01)}])
def test_ddim_is_ours(denoiser, settings):
    theirs, times = sample(denoiser, "diffusers:DDIMScheduler", timesteps=5, **settings)
    ours, own = sample(denoiser, "generalized", timesteps=5, **settings)
    assert times == own
    close(theirs, ours)


def test_dpm_solver_is_ours(denoiser):
    theirs, times = sample(denoiser, "diffusers:DPMSolverMultistepScheduler", timesteps=5, skip_type="trailing")
    ours, own = sample(denoiser, "dpmpp_2m", timesteps=5, skip_type="trailing")
    assert times == own
    close(theirs, ours)


def test_a_scheduler_of_noise_levels_shows_the_network_what_it_knows(denoiser):
    """Euler's moves y = x / alpha; along the same steps it is DDIM."""
    seen = []
    theirs, times = sample(denoiser, "diffusers:EulerDiscreteScheduler", timesteps=5, skip_type="leading",
                           callback=lambda index, t, x, x0, eps: seen.append((index, t, x.std().item())))
    ours, own = sample(denoiser, "generalized", timesteps=5, skip_type="leading")
    assert times == own and [each[:2] for each in seen] == list(enumerate(times[::-1]))
    assert abs(seen[0][2] - 1) < 0.05
    close(theirs, ours)


def test_v_is_given_where_a_network_predicts_something_else():
    schedule = make_schedule(Config.model_validate({
        "data": {"dataset": "ZIP", "image_size": 8}, "model": {},
        "diffusion": {"prediction": "v_prediction", "zero_terminal_snr": True}}).diffusion)
    denoiser = Denoiser(lambda x, t: torch.tanh(x), schedule, "v_prediction")
    theirs, times = sample(denoiser, "diffusers:DDIMScheduler", timesteps=4, skip_type="trailing")
    ours, own = sample(denoiser, "generalized", timesteps=4, skip_type="trailing")
    assert times == own and times[-1] == 999
    close(theirs, ours)


def test_an_image_depends_on_its_seed_only(denoiser):
    both, _ = sample(denoiser, "diffusers:EulerAncestralDiscreteScheduler", timesteps=3, skip_type="leading")
    alone, _ = sample(denoiser, "diffusers:EulerAncestralDiscreteScheduler", [1], timesteps=3, skip_type="leading")
    close(both[1:], alone)


def test_a_second_order_scheduler_calls_the_network_twice(denoiser):
    settings = SamplerSettings(sample_type="diffusers:HeunDiscreteScheduler", timesteps=4, skip_type="leading")
    chain = SchedulerChain(settings, denoiser.schedule, denoiser.prediction)
    assert len(chain.times) == 4 and chain.calls() == 7
    assert torch.isfinite(sample(denoiser, settings.sample_type, timesteps=4, skip_type="leading")[0]).all()


@pytest.mark.parametrize(("name", "settings", "message"), [
    ("UniPCScheduler", {}, "no scheduler of that name; did you mean UniPCMultistepScheduler"),
    ("FlowMatchEulerDiscreteScheduler", {}, "not a scheduler of a chain of betas"),
    ("RePaintScheduler", {}, "original_image|no prediction_type"),
    ("DDIMInverseScheduler", {}, "does not run from noise to an image"),
    ("UniPCMultistepScheduler", {"eta": 0.5}, "takes none"),
    ("DDIMScheduler", {"skip_type": "quad"}, "know leading, linspace, trailing"),
    ("DDIMScheduler", {"timesteps": "ddim10"}, "take a number of steps"),
    ("EulerDiscreteScheduler", {"skip_type": "linspace"}, "between the steps"),
])
def test_what_does_not_work_is_one_line(denoiser, name, settings, message):
    with pytest.raises(UserError, match=message) as refused:
        sample(denoiser, f"diffusers:{name}", **{"timesteps": 7, **settings})
    assert "\n" not in str(refused.value)


def test_continuous_schedules_are_refused():
    schedule = make_schedule(Config.model_validate({
        "data": {"dataset": "ZIP", "image_size": 8}, "model": {},
        "diffusion": {"schedule": "flow", "prediction": "flow"}}).diffusion)
    with pytest.raises(UserError, match="discrete schedules"):
        SchedulerChain(SamplerSettings(sample_type="diffusers:DDIMScheduler", timesteps=4), schedule)
