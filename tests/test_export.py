"""Networks as folders of diffusers and back, in processes that do not know this program."""

import json
import subprocess
import sys

import pytest
import torch
import yaml

import diagnose
import generate
import train_ddp
from configs.sampling import SamplerSettings
from functions.rng import SeededNoise
from runners.diffusion import Diffusion
from tests.conftest import REPOSITORY, TINY

ALONE = """
import os, sys
sys.path = [each for each in sys.path if each not in ("", {repository!r})]
import torch
from diffusers import DDIMPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
torch.set_num_threads(1)
for line in sys.stdin:
    folder, body = eval(line)
    if not (child := os.fork()):
        os.chdir(folder)
        given = dict(torch=torch, x=torch.load("x.pt"))
        exec(body, given)
        torch.save(given["out"], "out.pt")
        assert not any(name in sys.modules for name in ("functions", "runners", "models"))
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""
CARD = """
def of_card(folder, image):
    code = open(f"{folder}/README.md").read().partition("```python")[2].partition("```")[0]
    made = {}
    exec(code if image else code.partition("image =")[0], made)
    return made["pipeline"]
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """What diffusers makes of ``x`` in a process that does not know this program, in another folder.

    It is forked from one that imports diffusers while the tests here begin.
    """
    alone = tmp_path_factory.mktemp("alone")
    errors = alone / "errors"
    with open(errors, "w") as file:
        process = subprocess.Popen([sys.executable, "-c", ALONE.format(repository=str(REPOSITORY))], cwd=alone,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True)

    def run(folder, body, x):
        torch.save(x, folder / "x.pt")
        print(repr((str(folder), CARD + body)), file=process.stdin, flush=True)
        assert process.stdout.readline() == "0\n", errors.read_text()[-2000:]
        return torch.load(folder / "out.pt")

    yield run
    process.kill()
    process.wait()


DDIM = """
pipeline = of_card("exported", image=True)
pipeline.set_progress_bar_config(disable=True)
import sys
sys.modules[type(pipeline).__module__].randn_tensor = lambda *args, **kwargs: x
images = lambda steps: pipeline(batch_size=len(x), num_inference_steps=steps, eta=0.0, output_type="np").images
out = {steps: torch.from_numpy(images(steps)).movedim(-1, 1) for steps in (10, 50)}
"""


def ours_and_theirs(run_folder, tmp_path, elsewhere):
    diffusion = Diffusion.from_run(run_folder, device="cpu")
    x = SeededNoise([0, 1]).randn((2, *diffusion.codec.shape))
    return [(next(diffusion.sample([0, 1], SamplerSettings(timesteps=steps))).images, images)
            for steps, images in elsewhere(tmp_path, DDIM, x).items()]


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("extra", [
    ["--model.ch_mult", "[1,2]", "--model.attn_resolutions", "[4]"],
    ["--diffusion.beta_schedule", "scaled_linear", "--diffusion.prediction", "v_prediction",
     "--diffusion.set_alpha_to_one", "false"],
    ["--diffusion.beta_schedule", "cosine", "--diffusion.prediction", "sample"],
], ids=["epsilon", "v", "sample"])
def test_diffusers_makes_our_images_of_our_noise(tmp_path, extra, capsys, elsewhere):
    assert train_ddp.main([*TINY, "--exp", str(tmp_path), "--doc", "digits", "--max_steps", "2", *extra]) == 0
    (tmp_path / "fid.txt").write_text("Checkpoint digits/ckpt_2.pth  --> FID 12.5\n"
                                      "Checkpoint other/ckpt.pth  --> FID 1\n")
    base = ["--exp", str(tmp_path), "--doc", "digits", "--device", "cpu", "--verbose", "critical"]
    assert generate.main([*base, "--export", str(tmp_path / "exported")]) == 0
    for ours, theirs in ours_and_theirs(tmp_path / "logs" / "digits", tmp_path, elsewhere):
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    modes = {path.stat().st_mode for path in (tmp_path / "exported").rglob("*.*")}
    assert modes == {(tmp_path / "fid.txt").stat().st_mode}
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "sequence-aware, K = 2, lamda = 1" in card and "FID 12.5" in card and "FID 1\n" not in card
    assert front_matter(card) == {"library_name": "diffusers", "pipeline_tag": "unconditional-image-generation",
                                  "tags": ["diffusion"]}
    assert generate.main([*base, "--export", str(tmp_path / "exported")]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(("extra", "message"), [
    (["--model.resamp_with_conv", "false"], "resamples by averages"), (["--model.num_classes", "10"], "num_classes 10"),
    (["--diffusion.schedule", "flow", "--diffusion.prediction", "flow"], "diffusion.schedule flow"),
    (["--data.rescaled", "false"], "not in [-1, 1]"), (["--diffusion.timestep_respacing", "50"], "respacing 50"),
    (["--diffusion.rescale_timesteps", "true", "--diffusion.num_diffusion_timesteps", "100"], "rescale_timesteps"),
    (["--diffusion.prediction", "edm"], "diffusion.prediction edm: DDIMScheduler knows epsilon, v_prediction, sample"),
])
def test_what_diffusers_does_not_compute_is_one_line(trained, tmp_path, capsys, extra, message):
    base = [*TINY, *extra, "--weights", str(trained / "logs" / "digits" / "ckpt.pth"), "--exp", str(tmp_path)]
    assert generate.main([*base, "--export", str(tmp_path / "exported")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "exported").exists()


def test_a_pipeline_of_pixels_is_sampled_measured_trained_and_exported_again(tmp_path, elsewhere):
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
    for ours, theirs in ours_and_theirs(tmp_path / "logs" / "tuned", tmp_path, elsewhere):
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    assert DDIMPipeline.from_pretrained(tmp_path / "exported").scheduler.config.clip_sample is False
    assert generate.main([*common, "--weights", str(tmp_path / "exported"), "--timesteps", "4", "--seeds", "0-1",
                          "--no-fid", "-i", str(tmp_path / "again")]) == 0


@pytest.mark.parametrize(("extra", "message"), [(["--data.rescaled", "false"], "not in [-1, 1]"),
                                                (["--diffusion.timestep_respacing", "50"], "respacing 50")])
def test_what_diffusers_does_not_compute_of_its_own_networks_is_one_line(tmp_path, capsys, extra, message):
    from tests.pipelines import ddpm_pipeline

    base = ["--exp", str(tmp_path), "--device", "cpu", "--weights", str(ddpm_pipeline(tmp_path / "ddpm")), *extra]
    assert generate.main([*base, "--export", str(tmp_path / "exported")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "exported").exists()


def test_a_card_says_of_the_training_what_is_known(tmp_path):
    from tests.pipelines import ddpm_pipeline

    folder = ddpm_pipeline(tmp_path / "ddpm")
    assert generate.main(["--exp", str(tmp_path), "--device", "cpu", "--verbose", "critical", "--weights", str(folder),
                          "--export", str(tmp_path / "exported")]) == 0
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "| training | not known here; the weights are those of ddpm |" in card and "K = " not in card
    assert front_matter(card)["pipeline_tag"] == "unconditional-image-generation"


def test_another_chain_than_the_configurations_is_refused(tmp_path, capsys):
    from tests.pipelines import ddpm_pipeline

    folder = ddpm_pipeline(tmp_path / "ddpm", norm_eps=1e-6)
    assert generate.main([*TINY[:4], "--exp", str(tmp_path), "--weights", str(folder), "--no-fid", "--timesteps", "2",
                          "--num_samples", "1"]) == 2
    assert "diffusion.beta_end 0.012, 0.02 there" in capsys.readouterr().err


LATENT = """
pipeline = of_card("exported", image=False)
import sys
sys.modules[type(pipeline).__module__].randn_tensor = lambda *args, **kwargs: x
out = torch.tensor(pipeline(batch_size=len(x), num_inference_steps=5, output_type="np").images).permute(0, 3, 1, 2)
"""


def test_latents_without_text_are_trained_measured_and_exported(tmp_path, captioned, elsewhere):
    from tests.pipelines import latent_pipeline

    folder = latent_pipeline(tmp_path / "ldm")
    common = ["--exp", str(tmp_path), "--device", "cpu", "--verbose", "critical", "--data.dataset", "FOLDER",
              "--data.root", str(captioned)]
    assert train_ddp.main([*common, "--config", str(folder), "--doc", "tuned", "--max_steps", "2", "--optim.lr", "0.01",
                           "--training.batch_size", "4", "--training.sample_num", "0"]) == 0
    assert diagnose.main(["eps-norm", *common, "--doc", "tuned", "--timesteps", "3", "--num_images", "4"]) == 0
    assert generate.main([*common[:6], "--doc", "tuned", "--export", str(tmp_path / "exported")]) == 0
    diffusion = Diffusion.from_run(tmp_path / "logs" / "tuned", device="cpu")
    x = SeededNoise([0, 1]).randn((2, *diffusion.codec.shape))
    ours = next(diffusion.sample([0, 1], SamplerSettings(timesteps=5))).images
    torch.testing.assert_close(elsewhere(tmp_path, LATENT, x), ours, atol=1e-3, rtol=0)


LOADED = """
from diffusers import DDIMScheduler
out = []
for folder in ("whole", "lora"):
    pipeline = of_card(folder, image=False)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    out.append(pipeline(["a red square"] * 2, height=16, width=16, guidance_scale=5.0, num_inference_steps=5, latents=x,
                        output_type="latent").images)
"""


def test_what_was_tuned_is_loaded_by_diffusers(tmp_path, sdxl, captioned, elsewhere, capsys):
    from models.text import TextEncoders
    from runners.conditioning import TypedPrompts

    common = ["--exp", str(tmp_path), "--device", "cpu", "--verbose", "critical"]
    for doc, more in (("whole", []), ("lora", ["--model.lora_rank", "2", "--model.lora_alpha", "5"])):
        assert train_ddp.main([*common, "--doc", doc, "--config", str(sdxl), "--data.root", str(captioned),
                               "--training.batch_size", "4", "--training.sample_num", "0", "--optim.lr", "0.01",
                               "--max_steps", "4", *more]) == 0
        export = [*common, "--doc", doc, "--export", str(tmp_path / doc)]
        assert generate.main([*export, "--dry_run"]) == 0 and not (tmp_path / doc).exists()
        assert generate.main(export) == 0
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
    noise = SeededNoise([0, 1])
    x = noise.randn((2, 4, 8, 8))
    made = elsewhere(tmp_path, LOADED, x)
    for doc, theirs in zip(("whole", "lora"), made, strict=True):
        diffusion = Diffusion.from_run(tmp_path / "logs" / doc, device="cpu")
        diffusion.prompts = TypedPrompts(["a red square"], None, TextEncoders(sdxl), diffusion.config.data)
        sampler = diffusion.sampler(SamplerSettings(timesteps=5, guidance=5.0))
        ours = sampler.chain(sampler.conditioned(sampler.condition([0, 1])), x, noise)
        assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().mean()
        again = Diffusion(diffusion.config, "cpu")
        again.load(tmp_path / doc)                                          # and by this program
        before, after = diffusion.model.state_dict(), again.model.state_dict()
        assert all((before[name] - tensor).abs().max() <= 1e-6 for name, tensor in after.items())
    assert (made[0] - made[1]).abs().max() > 0.01
    assert generate.main(["--exp", str(tmp_path / "new"), "--weights", str(tmp_path / "lora"), "--prompt", "x"]) == 2
    assert f"{tmp_path / 'lora'} brings none" in capsys.readouterr().err
    assert front_matter((tmp_path / "lora" / "README.md").read_text()) == {       # a folder here is no base_model
        "library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["diffusion", "lora"]}
