"""Text-to-image networks from packing to pictures, on tiny pipelines with random weights and captioned JPEGs."""

import importlib.metadata
import json
import logging
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import diagnose
import generate
import train_ddp
from configs.sampling import SamplerSettings
from configs.schema import load_config
from functions.rng import SeededNoise
from models.text import TextEncoders
from runners.conditioning import TypedPrompts
from runners.diffusion import Diffusion
from runners.sampling.prompts import read_prompts
from tests.faults import jobs

PROMPT = "a red square"


def flags(exp, pipeline, data, *more):
    return ["--exp", str(exp), "--device", "cpu", "--verbose", "critical", "--config", str(pipeline),
            "--data.root", str(data), "--training.batch_size", "4", "--training.sample_num", "0",
            "--training.time_sampler", "uniform", "--loss.num_consecutive_steps", "0", "--loss.lamda", "0.0",
            "--loss.input_perturbation", "0.1", "--training.log_freq", "5", "--training.ema", "[0.9]",
            "--training.label_dropout", "0.1", "--optim.lr", "0.003", *more]


def losses(exp, doc):
    lines = (exp / "logs" / doc / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, sdxl, captioned):
    """An exp/ folder with 30 steps of all weights (gamma 0.1) and 30 of LoRA (K = 2)."""
    exp = tmp_path_factory.mktemp("tuned")
    assert train_ddp.main([*flags(exp, sdxl, captioned), "--doc", "whole", "--max_steps", "30",
                           "--optim.optimizer", "Adafactor", "--optim.weight_decay", "0.01", "--training.sample_num",
                           "2", "--training.sample_timesteps", "2"]) == 0
    assert train_ddp.main([*flags(exp, sdxl, captioned), "--doc", "lora", "--max_steps", "30", "--model.lora_rank", "4",
                           "--model.lora_alpha", "8", "--optim.optimizer", "AdamW", "--optim.lr", "0.03",
                           "--loss.num_consecutive_steps", "2", "--loss.lamda", "1.0"]) == 0
    return exp


def test_the_loss_falls(tuned):
    whole, lora = losses(tuned, "whole"), losses(tuned, "lora")
    assert len(whole) == len(lora) == 6
    assert list((tuned / "logs" / "whole" / "samples").glob("*.png"))
    assert whole[-1] < 0.8 * whole[0] and min(lora[-2:]) < lora[0]


def test_a_checkpoint_of_adapters_holds_nothing_else(tuned):
    state = torch.load(tuned / "logs" / "lora" / "ckpt.pth", weights_only=True)
    assert state["model"].keys() == state["ema"].keys() and all(".lora_" in name for name in state["model"])


@pytest.mark.parametrize(("doc", "more"), [("whole", ["--optim.optimizer", "Adafactor"]),
                                           ("lora", ["--model.lora_rank", "2", "--optim.optimizer", "AdamW",
                                                     "--loss.num_consecutive_steps", "2", "--loss.lamda", "1.0"])])
def test_resuming_is_exact(tmp_path, sdxl, captioned, doc, more):
    base = [*flags(tmp_path, sdxl, captioned), *more]
    assert train_ddp.main([*base, "--doc", "straight", "--max_steps", "4"]) == 0
    assert train_ddp.main([*base, "--doc", "halved", "--max_steps", "2"]) == 0
    assert train_ddp.main([*base, "--doc", "halved", "--max_steps", "4", "--resume_training"]) == 0
    one, two = (torch.load(tmp_path / "logs" / each / "ckpt.pth", weights_only=True) for each in ("straight", "halved"))
    for part in ("model", "ema"):
        assert all(torch.equal(tensor, two[part][name]) for name, tensor in one[part].items())
    for index, slots in one["optimizer"]["state"].items():
        for key, value in slots.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(two["optimizer"]["state"][index][key])), key


# ------------------------------------------------------------------------------------- against diffusers' own pipelines


def our_latents(folder, x, noise, **settings):
    config = load_config(folder)
    diffusion = Diffusion(config, "cpu")
    diffusion.load(None)
    diffusion.prompts = TypedPrompts([PROMPT], settings.pop("negative", None), TextEncoders(folder), config.data)
    sampler = diffusion.sampler(SamplerSettings(**settings))
    denoiser = sampler.conditioned(sampler.condition(noise.seeds))
    return sampler.chain(denoiser, x, noise)


@pytest.mark.parametrize("negative", [None, "big grey"])
@pytest.mark.parametrize("kind", ["sdxl", "sd"])
def test_ddim_gives_the_latents_of_the_pipeline(kind, negative, request):
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    folder = request.getfixturevalue(kind)
    made = {"sdxl": StableDiffusionXLPipeline, "sd": StableDiffusionPipeline}[kind]
    pipeline = made.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    noise = SeededNoise([3, 4])
    x = noise.randn((2, 4, 8, 8))
    theirs = pipeline([PROMPT] * 2, height=16, width=16, guidance_scale=5.0, num_inference_steps=10, eta=0.0, latents=x,
                      negative_prompt=negative and [negative] * 2, output_type="latent").images
    ours = our_latents(folder, x, noise, timesteps=10, guidance=5.0, negative=negative)
    assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().mean()


def test_adapters_go_on_with_the_weights_they_were_trained_with(tmp_path, sdxl_copy, captioned, capsys):
    base = [*flags(tmp_path, sdxl_copy, captioned), "--doc", "lora", "--model.lora_rank", "2", "--resume_training"]
    assert train_ddp.main([*base, "--max_steps", "1"]) == 0
    file = sdxl_copy / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.01 * tensor for name, tensor in load_file(file).items()}, file)
    assert train_ddp.main([*base, "--max_steps", "2"]) == 2
    assert "has trained adapters of other weights" in capsys.readouterr().err
    assert train_ddp.main([*base, "--max_steps", "2", "--force"]) == 0


# ------------------------------------------------------------------------------------------------------- two processes


def install_datasets(folder):
    """Hugging Face's package ``datasets`` beside the libraries that look for it; it has the name of our folder."""
    about = folder / "datasets-3.2.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: datasets\nVersion: 3.2.0\n")
    (folder / "datasets").mkdir()
    (folder / "datasets" / "__init__.py").write_text("class Dataset: ...\nclass IterableDataset: ...\n")
    sys.path.append(str(folder))
    from transformers.utils import is_datasets_available

    assert is_datasets_available() and importlib.metadata.version("datasets") == "3.2.0"


def test_two_processes_pack_and_train_as_one_beside_a_package_named_datasets(tmp_path, sdxl, captioned):
    def argv(exp):
        return [*flags(exp, sdxl, captioned), "--doc", "lora", "--max_steps", "3", "--training.log_freq", "1", "--amp",
                "off", "--training.global_batch_size", "8", "--training.micro_batch_size", "4", "--model.lora_rank",
                "2", "--optim.optimizer", "Adafactor", "--loss.num_consecutive_steps", "2", "--loss.lamda", "1.0"]

    both, alone = tmp_path / "both", tmp_path / "alone"
    pair = jobs.Job(partial(jobs.ranks_with, ["diffusers.models", "transformers.optimization", "peft"], "train_ddp"),
                    [argv(both)], faults=[partial(install_datasets, tmp_path / "site-packages")])
    assert train_ddp.main(argv(alone)) == 0
    assert pair.wait(120) == 0, pair.text
    assert losses(both, "lora") == pytest.approx(losses(alone, "lora"), rel=1e-5)
    packed, expected = (list(exp.glob("datasets/.packed/*.latents")) for exp in (both, alone))
    assert len(packed) == 1 and jobs.files(packed[0]) == jobs.files(expected[0])
    state = torch.load(both / "logs" / "lora" / "ckpt.pth", weights_only=True)
    assert len(state["metric_sums"]) == 2                                        # one entry for each rank


# --------------------------------------------------------------------------------------------------------- generate.py


def pictures(folder):
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)).astype(int) for path in folder.rglob("*.png")}


def test_an_image_depends_on_its_prompt_and_seed_only(tuned, tmp_path):
    def make(name, *more):
        assert generate.main(["--exp", str(tuned), "--doc", "whole", "--device", "cpu", "--verbose", "critical", "-i",
                              str(tmp_path / name), "--timesteps", "3", "--guidance", "5", "--eta", "0.5",
                              "--eps_scaler", "1.01", *more]) == 0
        return pictures(tmp_path / name)

    (tmp_path / "prompts.txt").write_text(f"a blue square\n\n{PROMPT}\n")
    many = make("many", "--prompt_file", str(tmp_path / "prompts.txt"), "--seeds", "0-2", "--batch_size", "4")
    one = make("one", "--prompt", PROMPT, "--seeds", "2", "--batch_size", "1")
    assert sorted(many) == [f"prompt_{p:04d}/{s:06d}.png" for p in (0, 1) for s in (0, 1, 2)]
    assert abs(many["prompt_0001/000002.png"] - one["000002.png"]).max() <= 1
    assert (many["prompt_0000/000002.png"] != many["prompt_0001/000002.png"]).any()
    manifest = json.loads((tmp_path / "many" / "manifest.json").read_text())
    assert manifest["prompts"] == ["a blue square", PROMPT] and len(manifest["model"]["pipeline"]) == 16
    assert Image.open(tmp_path / "many_grid.png").width > 500
    (tmp_path / "many" / "prompt_0001" / "000001.png").unlink()
    again = make("many", "--prompt_file", str(tmp_path / "prompts.txt"), "--seeds", "0-2", "--batch_size", "4")
    assert all(np.array_equal(again[name], image) for name, image in many.items())


def test_another_prompt_is_refused_for_the_same_folder(sdxl, tmp_path, capsys):
    base = ["--weights", str(sdxl), "--device", "cpu", "--verbose", "critical", "-i", str(tmp_path / "images"),
            "--timesteps", "2", "--seeds", "0", "--grid", "0"]
    assert generate.main([*base, "--prompt", PROMPT]) == 0
    assert generate.main([*base, "--prompt", "a green square"]) == 2
    assert "prompts was ['a red square'], is ['a green square']" in capsys.readouterr().err


def test_a_run_goes_on_another_copy_of_its_base(tuned, sdxl, tmp_path):
    copy = shutil.copytree(sdxl, tmp_path / "elsewhere")
    base = ["--exp", str(tuned), "--doc", "lora", "--device", "cpu", "--verbose", "critical", "--timesteps", "2",
            "--seeds", "0", "--grid", "0", "--prompt", PROMPT]
    assert generate.main([*base, "-i", str(tmp_path / "a")]) == 0
    assert generate.main([*base, "-i", str(tmp_path / "b"), "--weights", str(copy)]) == 0
    assert generate.main([*base[:2], *base[4:], "-i", str(tmp_path / "c"), "--weights", str(copy)]) == 0
    a, b, c = (pictures(tmp_path / name)["000000.png"] for name in "abc")
    assert np.array_equal(a, b) and (a != c).any()


def test_a_pipeline_beside_a_configuration_gives_its_chain_and_is_not_contradicted(sd, tmp_path, capsys):
    silent = "data: {dataset: CAPTIONS, image_size: 16}\nmodel: {arch: diffusers, pretrained: /elsewhere}\n"
    base = ["--config", str(tmp_path / "sd.yml"), "--weights", str(sd), "--device", "cpu", "--verbose", "critical",
            "--timesteps", "2", "--seeds", "0", "--grid", "0", "--prompt", PROMPT, "--exp", str(tmp_path)]
    (tmp_path / "sd.yml").write_text(silent + "diffusion: {prediction: epsilon}\n")
    assert generate.main([*base, "-i", str(tmp_path / "images")]) == 2
    error = capsys.readouterr().err
    assert "diffusion.prediction 'epsilon', 'v_prediction' there" in error and error.count("\n") == 1
    (tmp_path / "sd.yml").write_text(silent)
    assert generate.main([*base, "-i", str(tmp_path / "images")]) == 0
    made = json.loads((tmp_path / "images" / "manifest.json").read_text())["diffusion"]
    assert (made["prediction"], made["beta_schedule"]) == ("v_prediction", "scaled_linear")


@pytest.mark.parametrize(("more", "code", "message"), [
    ([], 2, "give --prompt or --prompt_file"),
    (["--prompt", "x", "--prompt_file", "y"], 2, "exclude each other"),
    (["--prompt_file", "/nowhere.txt"], 3, "/nowhere.txt: cannot be read"),
    (["--prompt", "x", "--clip_denoised"], 2, "there is nothing to clip to"),
    (["--prompt", "x", "--prompt", "y", "--interpolation", "--seeds", "0"], 2, "of one prompt; 2 are given"),
    (["--prompt", "x", "--classes", "1"], 2, "takes no labels"),
    (["--prompt", "x", "--sample_type", "diffusers:DDIMSheduler"], 2, "did you mean DDIMScheduler"),
])
def test_wrong_requests_are_one_line(sdxl, tmp_path, capsys, more, code, message):
    assert generate.main(["--weights", str(sdxl), "--exp", str(tmp_path), "--device", "cpu", "--no-fid", *more]) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_weights_that_the_library_cannot_read_are_one_line(sdxl_copy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers").handlers[0], "stream", sys.stderr)
    file = sdxl_copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert generate.main(["--weights", str(sdxl_copy), "--exp", str(tmp_path), "--device", "cpu", "--prompt", "x"]) == 3
    error = capsys.readouterr().err
    assert "not loaded: Unable to load" in error and error.count("\n") == 1


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_a_broken_autoencoder_is_told_before_anything_is_sampled(sdxl_copy, tmp_path, capsys, more):
    (sdxl_copy / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    assert generate.main(["--weights", str(sdxl_copy), "--exp", str(tmp_path), "--device", "cpu", "--prompt", "x",
                          "--verbose", "critical", "-i", str(tmp_path / "images"), *more]) == 3
    assert "vae: not loaded" in capsys.readouterr().err and not (tmp_path / "images").exists()


def test_prompt_files_without_text_are_one_line(sdxl, tmp_path, capsys):
    for content, code, message in ((b"\x89PNG\r\n\x1a\n\x00", 3, "not a text file"), (b"a\x00b", 3, "not a text file"),
                                   (b"\n \n", 2, "holds no prompts")):
        (tmp_path / "prompts").write_bytes(content)
        assert generate.main(["--weights", str(sdxl), "--exp", str(tmp_path), "--device", "cpu", "--prompt_file",
                              str(tmp_path / "prompts")]) == code
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "prompts").write_bytes("a red square\n".encode("utf-8-sig"))
    assert read_prompts(str(tmp_path / "prompts")) == [PROMPT]


def test_a_network_of_pixels_takes_no_prompts(trained, capsys):
    base = ["--exp", str(trained), "--doc", "digits", "--device", "cpu", "--no-fid"]
    assert generate.main([*base, "--prompt", "x"]) == 2
    assert "takes no text" in capsys.readouterr().err


def test_eps_norms_and_scalings_of_latents(tuned, capsys):
    base = ["--exp", str(tuned), "--doc", "lora", "--device", "cpu", "--timesteps", "3", "--num_images", "4",
            "--verbose", "critical"]
    assert diagnose.main(["eps-norm", *base, "--guidance", "2"]) == 0
    assert diagnose.main(["fit-eps-scaler", *base, "--model", "constant"]) == 0
    assert "eps_scaler" in capsys.readouterr().out
    tables = sorted((tuned / "diagnose" / "lora").glob("eps-norm*.csv"))
    assert len(tables[0].read_text().splitlines()) == 4
