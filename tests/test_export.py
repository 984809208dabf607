"""Networks as folders of diffusers and back, in processes that do not know this program."""

import json
import subprocess
import sys

import pytest
import torch

import diagnose
import generate
import train_ddp
from configs.sampling import SamplerSettings
from functions.rng import SeededNoise
from runners.diffusion import Diffusion
from tests.conftest import TINY

ALONE = """
import sys, torch
sys.path = [each for each in sys.path if each not in ("", {repository!r})]
from diffusers import {names}
x = torch.load({x!r})
{body}
torch.save(out, {out!r})
assert not any(name in sys.modules for name in ("functions", "runners", "models"))
"""


def elsewhere(tmp_path, names, body, x):
    """What diffusers makes of ``x`` in a fresh process, in another folder."""
    torch.save(x, tmp_path / "x.pt")
    code = ALONE.format(repository=str(tmp_path), names=names, x=str(tmp_path / "x.pt"), body=body,
                        out=str(tmp_path / "out.pt"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(tmp_path / "out.pt")


DDIM = """
pipeline = DDIMPipeline.from_pretrained("exported")
pipeline.set_progress_bar_config(disable=True)
import diffusers.pipelines.ddim.pipeline_ddim as module
module.randn_tensor = lambda *args, **kwargs: x
out = {steps: pipeline(batch_size=len(x), num_inference_steps=steps, eta=0.0, output_type="pt").images
       for steps in (10, 50)}
"""


def here(tmp_path, x):
    """The same in this process, which is quicker."""
    from diffusers import DDIMScheduler, UNet2DModel

    unet = UNet2DModel.from_pretrained(tmp_path / "exported", subfolder="unet")
    scheduler, images = DDIMScheduler.from_pretrained(tmp_path / "exported", subfolder="scheduler"), {}
    for steps in (10, 50):
        scheduler.set_timesteps(steps)
        y = x
        for t in scheduler.timesteps:
            with torch.no_grad():
                y = scheduler.step(unet(y, t).sample, t, y).prev_sample
        images[steps] = (y / 2 + 0.5).clamp(0, 1)
    return images


def ours_and_theirs(run_folder, tmp_path, fresh):
    diffusion = Diffusion.from_run(run_folder, device="cpu")
    x = SeededNoise([0, 1]).randn((2, *diffusion.codec.shape))
    theirs = elsewhere(tmp_path, "DDIMPipeline", DDIM, x) if fresh else here(tmp_path, x)
    return [(next(diffusion.sample([0, 1], SamplerSettings(timesteps=steps))).images, images)
            for steps, images in theirs.items()]


EXTRA = [["--model.ch_mult", "[1,2]", "--model.attn_resolutions", "[4]"],
         ["--diffusion.beta_schedule", "scaled_linear", "--diffusion.prediction", "v_prediction",
          "--diffusion.set_alpha_to_one", "false"],
         ["--diffusion.beta_schedule", "cosine", "--diffusion.prediction", "sample"]]


@pytest.mark.parametrize("extra", EXTRA, ids=["epsilon", "v", "sample"])
def test_diffusers_makes_our_images_of_our_noise(tmp_path, extra, capsys):
    assert train_ddp.main([*TINY, "--exp", str(tmp_path), "--doc", "digits", "--max_steps", "2", *extra]) == 0
    (tmp_path / "fid.txt").write_text("Checkpoint digits/ckpt_2.pth  --> FID 12.5\n"
                                      "Checkpoint other/ckpt.pth  --> FID 1\n")
    base = ["--exp", str(tmp_path), "--doc", "digits", "--device", "cpu", "--verbose", "critical"]
    assert generate.main([*base, "--export", str(tmp_path / "exported")]) == 0
    for ours, theirs in ours_and_theirs(tmp_path / "logs" / "digits", tmp_path, fresh=extra is EXTRA[0]):
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "sequence-aware, K = 2, lamda = 1" in card and "FID 12.5" in card and "FID 1\n" not in card
    assert generate.main([*base, "--export", str(tmp_path / "exported")]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(("extra", "message"), [
    (["--model.resamp_with_conv", "false"], "resamples by averages"), (["--model.num_classes", "10"], "num_classes 10"),
    (["--diffusion.schedule", "flow", "--diffusion.prediction", "flow"], "diffusion.schedule flow"),
    (["--data.rescaled", "false"], "not in [-1, 1]"),
    (["--diffusion.rescale_timesteps", "true", "--diffusion.num_diffusion_timesteps", "100"], "rescale_timesteps"),
])
def test_what_diffusers_does_not_compute_is_one_line(trained, tmp_path, capsys, extra, message):
    base = [*TINY, *extra, "--weights", str(trained / "logs" / "digits" / "ckpt.pth"), "--exp", str(tmp_path)]
    assert generate.main([*base, "--export", str(tmp_path / "exported")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "exported").exists()


def test_a_pipeline_of_pixels_is_sampled_measured_trained_and_exported_again(tmp_path, capsys):
    from diffusers import DDIMPipeline

    from tests.pipelines import ddpm_pipeline

    folder = ddpm_pipeline(tmp_path / "ddpm")
    common = ["--exp", str(tmp_path), "--device", "cpu", "--verbose", "critical"]
    assert generate.main([*common, "--weights", str(folder), "--timesteps", "4", "--seeds", "0-1", "--no-fid", "-i",
                          str(tmp_path / "images")]) == 0
    tuning = ["--config", str(folder), "--data.dataset", "DIGITS", "--training.batch_size", "8",
              "--training.sample_num", "0"]
    assert diagnose.main(["eps-norm", *common, *tuning[:4], "--timesteps", "4", "--num_images", "4"]) == 0
    assert train_ddp.main([*common, *tuning, "--doc", "tuned", "--max_steps", "20"]) == 0
    assert generate.main([*common, "--doc", "tuned", "--export", str(tmp_path / "exported")]) == 0
    settings = json.loads((tmp_path / "exported" / "unet" / "config.json").read_text())
    assert settings["_class_name"] == "UNet2DModel" and settings["attention_head_dim"] == 8
    for ours, theirs in ours_and_theirs(tmp_path / "logs" / "tuned", tmp_path, fresh=False):
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    assert DDIMPipeline.from_pretrained(tmp_path / "exported").scheduler.config.clip_sample is False
    assert generate.main([*common, "--weights", str(tmp_path / "exported"), "--timesteps", "4", "--seeds", "0-1",
                          "--no-fid", "-i", str(tmp_path / "again")]) == 0


def test_another_chain_than_the_configurations_is_refused(tmp_path, capsys):
    from tests.pipelines import ddpm_pipeline

    folder = ddpm_pipeline(tmp_path / "ddpm", norm_eps=1e-6)
    assert generate.main([*TINY[:4], "--exp", str(tmp_path), "--weights", str(folder), "--no-fid", "--timesteps", "2",
                          "--num_samples", "1"]) == 2
    assert "diffusion.beta_end 0.012, 0.02 there" in capsys.readouterr().err


LOADED = """
out = []
for adapters in (False, True):
    if adapters:
        pipeline = StableDiffusionXLPipeline.from_pretrained({base!r})
        pipeline.load_lora_weights("lora")
    else:
        unet = UNet2DConditionModel.from_pretrained("whole", subfolder="unet")
        pipeline = StableDiffusionXLPipeline.from_pretrained({base!r}, unet=unet)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    out.append(pipeline(["a red square"] * 2, height=16, width=16, guidance_scale=5.0, num_inference_steps=5, latents=x,
                        output_type="latent").images)
"""


def test_what_was_tuned_is_loaded_by_diffusers(tmp_path, sdxl, captioned):
    from models.text import TextEncoders
    from runners.conditioning import TypedPrompts

    common = ["--exp", str(tmp_path), "--device", "cpu", "--verbose", "critical"]
    for doc, more in (("whole", []), ("lora", ["--model.lora_rank", "2", "--model.lora_alpha", "5"])):
        assert train_ddp.main([*common, "--doc", doc, "--config", str(sdxl), "--data.root", str(captioned),
                               "--training.batch_size", "4", "--training.sample_num", "0", "--optim.lr", "0.01",
                               "--max_steps", "4", *more]) == 0
        assert generate.main([*common, "--doc", doc, "--export", str(tmp_path / doc)]) == 0
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
    noise = SeededNoise([0, 1])
    x = noise.randn((2, 4, 8, 8))
    made = elsewhere(tmp_path, "DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel",
                     LOADED.format(base=str(sdxl)), x)
    for doc, theirs in zip(("whole", "lora"), made, strict=True):
        diffusion = Diffusion.from_run(tmp_path / "logs" / doc, device="cpu")
        diffusion.prompts = TypedPrompts(["a red square"], None, TextEncoders(sdxl), diffusion.config.data)
        sampler = diffusion.sampler(SamplerSettings(timesteps=5, guidance=5.0))
        ours = sampler.chain(sampler.conditioned(sampler.condition([0, 1])), x, sampler.times, noise)
        assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().mean()
        again = Diffusion(diffusion.config, "cpu")
        again.load(tmp_path / doc)                                          # and by this program
        before, after = diffusion.model.state_dict(), again.model.state_dict()
        assert all((before[name] - tensor).abs().max() <= 1e-6 for name, tensor in after.items())
    assert (made[0] - made[1]).abs().max() > 0.01
