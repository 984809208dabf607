"""What the core makes possible, through the scripts: classes, guidance, other outputs and schedules, averages."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diagnose
import generate
import train_ddp
from configs.sampling import SamplerSettings
from configs.schema import Config
from runners.diffusion import Diffusion
from runners.sampling.generation import tile_by_class
from tests.conftest import REPOSITORY, TINY
from tests.runners.test_training import assert_same
from utils.errors import UserError

CLASSES = ["--model.num_classes", "10", "--training.label_dropout", "0.3"]


def train(exp, *flags):
    assert train_ddp.main([*TINY, "--exp", str(exp), "--max_steps", "3", *flags]) == 0
    return exp / "logs" / "digits"


def sample(exp, *flags, name="out"):
    """Images by seed of generate.py, and its exit code."""
    code = generate.main(["--exp", str(exp), "--doc", "digits", "--device", "cpu", "--timesteps", "3", "--no-fid",
                          "--verbose", "critical", "--num_samples", "6", "-i", str(exp / name), *flags])
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in sorted((exp / name).glob("*.png"))}, code


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    exp = tmp_path_factory.mktemp("conditional")
    run = train(exp, *CLASSES, "--model.ch_mult", "[2]")                    # of width 32 groups have one channel each,
    state = torch.load(run / "ckpt.pth", weights_only=True)
    for part in ("model", "ema"):                                           # whose normalisation forgets embeddings
        state[part]["label_emb.weight"] *= 50
    state.pop("digests", None)                                              # the file is no longer what was saved
    torch.save(state, run / "ckpt.pth")
    return exp


def test_classes_go_by_seed_and_the_manifest_and_images_know_them(conditional):
    by_turns, code = sample(conditional, "--classes", "3,5", name="turns")
    manifest = json.loads((conditional / "turns" / "manifest.json").read_text())
    assert code == 0 and manifest["sampler"]["classes"] == "3,5"
    threes, _ = sample(conditional, "--class", "3", name="threes")
    assert np.array_equal(by_turns["000002.png"], threes["000002.png"])
    assert not np.array_equal(by_turns["000003.png"], threes["000003.png"])
    random, _ = sample(conditional, name="random")
    diffusion = Diffusion.from_run(conditional / "logs" / "digits", device="cpu")
    labels = diffusion.sampler(SamplerSettings(timesteps=3)).labels(range(6)).tolist()
    assert len(set(labels)) > 1 and all(0 <= label < 10 for label in labels)
    one, _ = sample(conditional, "--class", str(labels[4]), "--seeds", "4", "--num_samples", "1", name="one")
    assert np.array_equal(one["000004.png"], random["000004.png"])


def test_guidance_of_one_is_none_and_of_two_extrapolates(conditional):
    plain, _ = sample(conditional, "--classes", "0-9", name="plain")
    same, _ = sample(conditional, "--classes", "0-9", "--guidance", "1", name="same")
    more, _ = sample(conditional, "--classes", "0-9", "--guidance", "3", name="more")
    outside, _ = sample(conditional, "--classes", "0-9", "--guidance", "3", "--guidance_interval", "1e5,1e6",
                        name="far")
    for name in plain:
        assert np.array_equal(plain[name], same[name]) and np.array_equal(plain[name], outside[name])
    assert any(not np.array_equal(plain[name], more[name]) for name in plain)


def test_all_measures_of_a_guided_chain_but_gamma_which_is_of_the_network_alone(conditional, capsys):
    flags = ["--exp", str(conditional), "--doc", "digits", "--device", "cpu", "--timesteps", "2", "--num_images", "4"]
    assert diagnose.main(["all", *flags, "--guidance", "2"]) == 0
    out = capsys.readouterr().out
    made = {path.name.partition("-DDIM")[0] for path in (conditional / "diagnose" / "digits").iterdir()}
    assert made == {"eps-norm", "exposure", "gap", "spectrum", "snr", "energy", "all"}
    assert "gamma is left out" in out and "generate.py" not in out


def test_autoguidance_takes_its_configuration_from_beside_the_weights(conditional, tmp_path):
    worse = train(tmp_path, *CLASSES, "--model.num_res_blocks", "2", "--seed", "5")
    guided, code = sample(conditional, "--guide_weights", str(worse / "ckpt.pth"), "--guidance", "2", name="auto")
    plain, _ = sample(conditional, name="random2")
    assert code == 0 and any(not np.array_equal(plain[name], guided[name]) for name in plain)
    assert json.loads((conditional / "auto" / "manifest.json").read_text())["guide"]
    diffusion = Diffusion.from_run(conditional / "logs" / "digits", device="cpu")
    diffusion.guide = Diffusion.from_run(conditional / "logs" / "digits", device="cpu")      # by itself: no change
    image, = diffusion.sample([0], timesteps=3, guidance=2.0)
    assert np.abs(image.images[0, 0].numpy() * 255 - plain["000000.png"]).max() <= 1


@pytest.mark.parametrize("keys", [
    {}, {"sample_type": "ddpm_noisy"}, {"sample_type": "heun"}, {"sample_type": "heun", "churn": (2,)},
    {"sample_type": "heun", "alpha": 0.5}, {"sample_type": "euler"}, {"sample_type": "dpmpp_2m"},
    {"restart": "3,2,0.3,9"}, {"time_shift": "200,100", "sample_type": "heun"}, {"time_shift": "200,100,code"},
    {"sample_type": "diffusers:HeunDiscreteScheduler", "skip_type": "trailing"}])
def test_network_calls_are_counted_where_guidance_acts(keys):
    config = Config(data={"dataset": "DIGITS", "image_size": 8, "channels": 1}, model={
        "in_channels": 1, "out_ch": 1, "ch": 32, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [],
        "num_classes": 4})
    diffusion = Diffusion(config, "cpu")

    def calls(**more):
        sampler, seen = diffusion.sampler(SamplerSettings.model_validate({"timesteps": 6, **keys, **more})), []
        sampler.denoiser = sampler.denoiser.calling(lambda x, t, labels: seen.append(t) or torch.zeros_like(x))
        sampler([3])
        assert sampler.calls == len(seen)
        return len(seen)

    plain = calls()
    assert calls(guidance=2.0) == 2 * plain
    assert plain < calls(guidance=2.0, guidance_interval=(0.5, 5.0)) < 2 * plain
    if "time_shift" not in keys:                                      # images with times of their own are all guided
        assert calls(guidance=2.0, guidance_interval=(1e5, 1e6)) == plain


def test_a_guide_is_told_no_classes_that_the_network_does_not_have(conditional, trained, tmp_path, capsys):
    flags = ["--guidance", "2", "--guide_weights", str(conditional / "logs" / "digits" / "ckpt.pth")]
    shutil.copytree(trained / "logs", tmp_path / "logs")
    for more in ([], ["--dry_run"]):
        assert sample(tmp_path, *flags, *more)[1] == 2
        error = capsys.readouterr().err
        assert "that network is told 10 classes, this one none" in error and error.count("\n") == 1
    diffusion = Diffusion.from_run(trained / "logs" / "digits", device="cpu")
    diffusion.guide = Diffusion.from_run(conditional / "logs" / "digits", device="cpu")
    with pytest.raises(UserError, match="told 10 classes, this one none; give one that is told as many, or none"):
        next(diffusion.sample([0], timesteps=3, guidance=2.0))


def test_a_grid_has_a_row_for_each_class():
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 1, 4, 4)
    sheet = tile_by_class(images, [2, 0, 1] * 4)
    size = sheet.shape[2] // 4
    rows = [[sheet[0, row * (size + 1) + size // 2, column * (size + 1) + size // 2].item() for column in range(4)]
            for row in range(3)]
    assert rows == [[1, 4, 7, 10], [2, 5, 8, 11], [0, 3, 6, 9]]


@pytest.mark.parametrize(("flags", "message"), [
    (["--classes", "8-12"], "classes 0 to 9"), (["--classes", "0-4294967295"], "classes 0 to 9"),
    (["--classes", "x"], "neither random, none, nor a list"),
    (["--guidance_interval", "1,2"], "guidance_interval needs guidance"),
    (["--guidance", "2", "--guidance_interval", "2,1"], "is empty"), (["--guidance", "strong"], "--guidance"),
    (["--guide_weights", "absent.pth", "--guidance", "2"], "no such file"), (["--ema_length", "0.05"], "has kept no"),
])
def test_refusals_of_a_conditional_network(conditional, capsys, flags, message):
    _, code = sample(conditional, *flags, name="refused")
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1 and not (conditional / "refused").exists()


@pytest.mark.parametrize(("flags", "message"), [
    (["--classes", "1"], "takes no labels"), (["--guidance", "2"], "needs a network with classes or prompts"),
    (["--sample_type", "ddpm_noisy", "--eta", "0.5"], "eta is for generalized, not for ddpm_noisy"),
    (["--var_type", "fixedsmall"], "var_type fixedsmall is for ddpm_noisy"),
    (["--sample_type", "ddpm_noisy", "--var_type", "learned"], "learned no variances")])
def test_refusals_of_a_plain_network(trained, capsys, flags, message):
    _, code = sample(trained, *flags, name="refused")
    assert code == 2 and message in capsys.readouterr().err


def test_labels_that_the_data_do_not_have(tmp_path, capsys):
    for i in range(10):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / f"{i}.png")
    flags = ["--data.dataset", "FOLDER", "--data.root", str(tmp_path), "--exp", str(tmp_path / "exp")]
    assert train_ddp.main([*TINY, *flags, *CLASSES]) == 2
    assert "(-1: none); the network takes 0 to 9" in capsys.readouterr().err
    assert train_ddp.main([*TINY, *flags, "--training.label_dropout", "0.1"]) == 2
    assert "set model.num_classes" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [
    ["--diffusion.prediction", "v_prediction", "--diffusion.zero_terminal_snr", "true", "--loss.weight", "min_snr"],
    ["--diffusion.prediction", "sample", "--diffusion.beta_schedule", "cosine"],
    ["--diffusion.schedule", "flow", "--diffusion.prediction", "flow", "--training.time_sampler", "logit_normal"],
    ["--diffusion.schedule", "sigma", "--diffusion.prediction", "v_prediction",
     "--training.time_sampler", "lognormal"]])
@pytest.mark.parametrize("sampler", ["heun", "ddpm_noisy"])
def test_other_outputs_and_schedules_train_and_sample(tmp_path, flags, sampler):
    train(tmp_path, *flags, "--input_perturbation", "0.1", "--training.validation_freq", "2",
          "--data.validation_fraction", "0.1")
    images, code = sample(tmp_path, "--sample_type", sampler)
    assert code == 0 and len(images) == 6
    single, code = sample(tmp_path, "--sample_type", sampler, "--batch_size", "1", name="single")
    assert all(np.abs(images[name] - single[name]).max() <= 1 for name in images)


AVERAGES = ["--training.ema", "[{rate: 0.9}, {half_life: 50}, {length: 0.05}, {length: 0.10}]",
            "--training.snapshot_unit", "steps", "--training.snapshot_freq", "2"]


def test_several_averages_resume_exactly_and_any_length_is_made_up_afterwards(tmp_path, capsys):
    whole = train(tmp_path / "whole", *AVERAGES, "--max_steps", "6")
    train(tmp_path / "halves", *AVERAGES)
    halves = train(tmp_path / "halves", *AVERAGES, "--max_steps", "6", "--resume_training")
    a, b = (torch.load(run / "ckpt.pth", weights_only=True) for run in (whole, halves))
    assert_same({**a, "snapshots": 0}, {**b, "snapshots": 0})
    assert sorted(p.name for p in whole.glob("phema_*")) == [
        f"phema_{step}_{length}.pth" for step in (2, 4, 6) for length in ("0.050", "0.100")]
    stored = torch.load(whole / "phema_6_0.050.pth", weights_only=True)["weights"]
    diffusion = Diffusion.from_run(whole, device="cpu")
    from runners.training.checkpoint import RunFolder

    diffusion.load_average(RunFolder(whole), None, 0.05)                     # one that is there comes out as it is
    for name, value in diffusion.model.state_dict().items():
        torch.testing.assert_close(value, stored[name], rtol=1e-4, atol=1e-5)
    earlier = Diffusion(diffusion.config.replace("sampling.ckpt_id", 2), "cpu")
    earlier.load_average(RunFolder(whole), None, 0.05)
    assert earlier.weights.step == 2, "the configuration's epoch"
    images, code = sample(tmp_path / "whole", "--ema_length", "0.07")
    assert code == 0 and len(images) == 6 and diffusion.weights.step == 6
    assert sample(tmp_path / "whole", "--ema_length", "0.4", name="long")[1] == 2
    assert "not in (0, 0.289)" in capsys.readouterr().err


def test_the_example_runs(tmp_path):
    import example

    example.main(steps=1, target=str(tmp_path / "example.png"))
    assert Image.open(tmp_path / "example.png").size[0] >= 640


@pytest.mark.parametrize("page", ["core.md"])
def test_python_in_the_docs_runs(page):
    for block in re.findall(r"```python\n(.*?)```", Path(REPOSITORY / "docs" / page).read_text(), re.DOTALL):
        exec(compile(block, page, "exec"), {})  # noqa: S102
