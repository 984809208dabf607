"""Pipelines of diffusers as networks, codecs and text encoders, against what diffusers itself computes from them."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.pipelines import SCHEDULER, contradictions, diffusion_keys, fill_in
from configs.sampling import SamplerSettings
from configs.schema import load_config, save_config, validate
from functions.denoiser import Denoiser
from models import build_model, load_weights, make_codec
from models.pretrained import ENCODERS, LORA_FILE, lora_from_file, lora_to_file, pipeline_fingerprint
from models.text import TextEncoders
from models.trained import trained
from runners.diagnosis.likelihood import check_likelihood
from runners.diffusion import Diffusion
from runners.sampling.sampler import check_settings
from tests.faults import jobs
from tests.pipelines import ddpm_pipeline, latent_pipeline
from utils.atomic import write_json
from utils.errors import ConfigError, DataError, UserError


def test_the_scheduler_file_gives_the_chain_and_survives_saving(sdxl, tmp_path):
    config = load_config(sdxl)
    given = config.diffusion
    assert (given.beta_schedule, given.beta_start, given.beta_end, given.prediction) == (
        "scaled_linear", 0.00085, 0.012, "epsilon")
    assert (given.skip_type, given.steps_offset, given.set_alpha_to_one) == ("leading", 1, False)
    save_config(config, tmp_path / "config.yml")
    assert load_config(tmp_path / "config.yml") == config


def test_a_configuration_that_contradicts_the_scheduler_file_is_refused(sd):
    with pytest.raises(ConfigError, match="contradicts the configuration: diffusion.prediction 'epsilon', 'v_pred"):
        load_config(sd, ["diffusion.prediction=epsilon"])


HUB_CONFIG = "data: {dataset: CAPTIONS, image_size: 16}\nmodel: {arch: diffusers, pretrained: owner/model}\n"


def hub_with(monkeypatch, folder):
    """A hub that is never asked for more than it has to give; returns what was asked for."""
    import huggingface_hub

    asked = []

    def snapshot(name, allow_patterns, ignore_patterns, local_files_only):
        if local_files_only and not asked:
            raise OSError("not in the cache")
        if not local_files_only:
            asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked


def test_a_model_of_the_hub_gives_its_chain_before_its_weights(sd, tmp_path, monkeypatch):
    asked = hub_with(monkeypatch, sd)
    (tmp_path / "hub.yml").write_text(HUB_CONFIG)
    config = load_config(tmp_path / "hub.yml")
    assert asked == [["model_index.json", "*/*.json"]]
    assert (config.diffusion.prediction, config.diffusion.beta_schedule) == ("v_prediction", "scaled_linear")
    save_config(config, tmp_path / "config.yml")
    assert load_config(tmp_path / "config.yml") == config and len(asked) == 1


def test_a_model_of_the_hub_that_cannot_be_had_is_no_error_of_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **keywords: Path("/nowhere").read_bytes())
    (tmp_path / "hub.yml").write_text(HUB_CONFIG)
    assert load_config(tmp_path / "hub.yml").model.pretrained == "owner/model"


def test_a_runner_refuses_another_chain_than_that_of_its_pipeline(sd):
    config = load_config(sd).replace("diffusion.prediction", "epsilon")
    with pytest.raises(UserError, match="contradicts the configuration: diffusion.prediction 'epsilon', 'v_pred"):
        Diffusion(config, "cpu")


def test_betas_that_a_cosine_scheduler_file_names_and_nobody_reads_are_passed_over(tmp_path):
    write_json(tmp_path / SCHEDULER, {
        "_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "beta_start": 0.00085, "beta_end": 0.012})
    raw = fill_in({"data": {"dataset": "FOLDER", "image_size": 8}, "model": {}}, tmp_path)
    config = validate(raw, "pipeline")
    assert (config.diffusion.beta_schedule, config.diffusion.beta_end) == ("cosine", 0.02)
    assert not contradictions(config.diffusion.model_dump(), tmp_path)
    assert contradictions({"beta_schedule": "linear"}, tmp_path)


def test_the_network_computes_what_diffusers_computes(sdxl):
    from diffusers import UNet2DConditionModel

    config = load_config(sdxl)
    model, theirs = build_model(config).eval(), UNet2DConditionModel.from_pretrained(sdxl, subfolder="unet").eval()
    assert model.state_dict().keys() == theirs.state_dict().keys()
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(4, 4, 8, 8, generator=generator), torch.tensor([3.0, 500.0, 3.0, 500.0])
    given = {"prompt_embeds": torch.randn(2, 16, 64, generator=generator),
             "pooled_embeds": torch.randn(2, 32, generator=generator),
             "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16], [30, 20, 4, 0, 16, 16]])}
    ours = Denoiser.of(config, model).given(given).raw(x, t)                     # rows are repeated, K-major
    expected = theirs(x, t, given["prompt_embeds"].repeat(2, 1, 1), added_cond_kwargs={
        "text_embeds": given["pooled_embeds"].repeat(2, 1), "time_ids": given["time_ids"].repeat(2, 1)}).sample
    assert torch.equal(ours, expected)


def test_latents_are_those_of_the_autoencoder(sdxl):
    from diffusers import AutoencoderKL

    vae, codec = AutoencoderKL.from_pretrained(sdxl, subfolder="vae").eval(), make_codec(load_config(sdxl))
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        posterior = vae.encode(images.float() / 127.5 - 1).latent_dist
        decoded = vae.decode(posterior.mean).sample
    assert codec.shape == (4, 8, 8) and not codec.bounded
    moments = codec.moments(images)
    torch.testing.assert_close(moments, torch.stack([posterior.mean, posterior.std], 1), atol=1e-5, rtol=1e-4)
    x0 = codec.encode(moments)
    torch.testing.assert_close(x0, 0.5 * posterior.mean, atol=1e-5, rtol=1e-4)          # the fixture's scaling_factor
    torch.testing.assert_close(codec.decode(x0), (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-4)
    drawn = codec.encode(moments, torch.Generator().manual_seed(1))
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, 0.5 * (posterior.mean + posterior.std * noise), atol=1e-5, rtol=1e-4)


def test_adapters_alone_are_trained_and_their_file_round_trips(sdxl, tmp_path):
    config = load_config(sdxl, ["model.lora_rank=2", "model.lora_alpha=6"])
    model = build_model(config)
    state = trained(model)
    assert state and all(".lora_" in name for name in state)
    assert sum(p.requires_grad for p in model.parameters()) == len(state)
    with torch.no_grad():
        for tensor in state.values():
            tensor.normal_(generator=torch.Generator().manual_seed(0))
    file = lora_to_file(state, model.lora_scale)
    assert model.lora_scale == 3
    back = lora_from_file(file, {}, model.lora_scale, tmp_path)
    assert back.keys() == state.keys()
    save_file(file, tmp_path / LORA_FILE)
    other = build_model(config)
    assert load_weights(other, tmp_path).format == "lora"
    for name, tensor in trained(other).items():
        torch.testing.assert_close(tensor, state[name])


def adapters_of_diffusers(sd, folder, **more):
    """A file as diffusers' training scripts save it, and what its network makes of some input with these adapters."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(sd, subfolder="unet").eval()
    unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"],
                                init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet),
                                              unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(), **more)
    given = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 16, 32)
    with torch.no_grad():
        return given, unet(*given).sample


@pytest.mark.parametrize("alpha", [2, 8])
def test_adapters_of_diffusers_count_as_much_as_their_file_notes(sd, tmp_path, alpha):
    given, expected = adapters_of_diffusers(sd, tmp_path)
    model = build_model(load_config(sd, ["model.lora_rank=2", f"model.lora_alpha={alpha}"])).eval()
    load_weights(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(*given), expected, atol=1e-5, rtol=1e-5)


def test_adapters_that_would_be_used_in_part_or_otherwise_are_refused(sd, tmp_path):
    model = build_model(load_config(sd, ["model.lora_rank=2"]))
    adapters_of_diffusers(sd, tmp_path, text_encoder_lora_layers={"q_proj.lora_A.weight": torch.zeros(2, 32)})
    with pytest.raises(DataError, match="holds text_encoder.q_proj.lora_A.weight; adapters of a U-Net alone"):
        load_weights(model, tmp_path)
    for noted, message in (({"unet.r": 2, "unet.lora_alpha": 2, "unet.use_rslora": True}, "adapters with use_rslora"),
                           ({"unet.r": 0, "unet.lora_alpha": 2}, "broken"), ([], "broken"), ("[", "broken")):
        save_file({"unet.a.lora_A.weight": torch.zeros(1)}, tmp_path / LORA_FILE, metadata={
            "lora_adapter_metadata": noted if noted == "[" else json.dumps(noted)})
        with pytest.raises(DataError, match=message):
            load_weights(model, tmp_path)


def test_adapters_are_refused_by_a_network_without_them(sdxl, tmp_path):
    (tmp_path / LORA_FILE).write_bytes(b"")
    with pytest.raises(UserError, match="set model.lora_rank"):
        load_weights(build_model(load_config(sdxl)), tmp_path)


def change(folder, file, **keys):
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**settings, **keys}))


def test_where_a_scheduler_file_is_silent_its_class_decides(tmp_path):
    (tmp_path / "scheduler").mkdir()
    found = {}
    for name in ("PNDMScheduler", "DDIMScheduler", "HeunDiscreteScheduler"):
        write_json(tmp_path / SCHEDULER, {"_class_name": name})
        keys = diffusion_keys(tmp_path)
        found[name] = keys["set_alpha_to_one"], keys["beta_start"], keys["beta_end"]
    assert found == {"PNDMScheduler": (False, 1e-4, 0.02), "DDIMScheduler": (True, 1e-4, 0.02),
                     "HeunDiscreteScheduler": (True, 0.00085, 0.012)}


def test_a_folder_as_configuration_asks_for_the_plain_loss(sdxl):
    loss = load_config(sdxl).loss
    assert (loss.terms, loss.lamda) == (1, 0)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda f: (f / "vae" / "config.json").unlink(), "has no vae/config.json"),
    (lambda f: (f / "unet" / "config.json").unlink(), "has no unet/config.json"),
    (lambda f: (f / "unet" / "config.json").write_text("[1"), "cannot be read"),
    (lambda f: change(f, "unet/config.json", _class_name="FluxTransformer2DModel"), "'FluxTransformer2DModel' is not"),
    (lambda f: change(f, "vae/config.json", _class_name="VQModel"), "'VQModel' is not known here"),
    (lambda f: change(f, "scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"),
     "'FlowMatchEulerDiscreteScheduler' is not known here"),
    (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no tensors"), "unet: not loaded"),
    (lambda f: change(f, "unet/config.json", num_class_embeds=10), "num_class_embeds 10"),
])
def test_folders_that_cannot_be_used_are_refused_in_one_line(sdxl_copy, spoil, message):
    spoil(sdxl_copy)
    with pytest.raises(DataError, match=message) as refused:
        config = load_config(sdxl_copy)
        make_codec(config), build_model(config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("part", "tensor", "load"), [
    ("unet", "conv_out.weight", lambda folder: build_model(load_config(folder))),
    ("vae", "decoder.conv_out.weight", lambda folder: make_codec(load_config(folder)).network("cpu")),
    ("text_encoder", "final_layer_norm.weight", TextEncoders),
    ("text_encoder_2", "text_projection.weight", TextEncoders)])
def test_files_that_lack_a_tensor_are_refused(sdxl_copy, part, tensor, load):
    (file,) = (sdxl_copy / part).glob("*.safetensors")
    content = load_file(file)
    name = next(name for name in content if name.endswith(tensor))
    save_file({"other": content.pop(name), **content}, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=f"{part}: not loaded: its files lack 1 tensors .* such as .*{tensor}"):
        load(sdxl_copy)


@pytest.mark.parametrize(("override", "message"), [
    ("data.channels=1", "data.channels 1: the autoencoder"), ("data.image_size=17", "not a multiple of 2"),
    ("model.lora_rank=0", "lora_rank"), ("model.lora_alpha=2", "needs model.lora_rank"),
    ("data.rescaled=false", "data.rescaled False is for diffusion of pixels"),
    ("data.uniform_dequantization=true", "data.uniform_dequantization True is for"),
    ("data.gaussian_dequantization=true", "data.gaussian_dequantization True is for"),
    ("model.lora_targets=[nothing]", "lora_targets nothing"),
    ("model.pretrained=/nowhere", "'/nowhere': no such folder")])
def test_settings_that_cannot_be_used_are_refused_in_one_line(sdxl, override, message):
    more = ["model.lora_rank=2"] if "targets" in override else []
    with pytest.raises(UserError, match=message) as refused:
        config = load_config(sdxl, [override, *more])
        make_codec(config), build_model(config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("part", "sizes", "message"), [
    ("unet", {"in_channels": 9}, "diffused has 4 channels, the U-Net takes 9 and gives 4; networks that are shown"),
    ("unet", {"out_channels": 5}, "the U-Net takes 4 and gives 5"),
    ("vae", {"latent_channels": 16}, "diffused has 16 channels")])
def test_a_unet_of_other_latents_is_refused_before_it_is_loaded(sdxl_copy, part, sizes, message):
    config = load_config(sdxl_copy)
    change(sdxl_copy, f"{part}/config.json", **sizes)
    with pytest.raises(DataError, match=message) as refused:
        make_codec(config)
    assert "\n" not in str(refused.value)


def test_images_that_a_unet_of_pixels_cannot_take_are_refused(tmp_path):
    folder = ddpm_pipeline(tmp_path / "ddpm")
    for override, message in (("data.channels=3", "data.channels 3: the U-Net of .* takes images of 1 channels"),
                              ("data.image_size=9", "data.image_size 9 cannot be halved 1 times for the U-Net of .*; "
                                                    "nearest valid: 8 and 10")):
        with pytest.raises(UserError, match=message):
            make_codec(load_config(folder, [override]))
    with pytest.raises(UserError, match="image_size 18 cannot be halved 2 times .*; nearest valid: 16 and 20"):
        make_codec(load_config(latent_pipeline(tmp_path / "latent"), ["data.image_size=18"]))
    batch, = Diffusion(load_config(folder, ["data.image_size=[6,10]"]), "cpu").sample([0], timesteps=1)
    assert batch.images.shape == (1, 1, 6, 10)


def test_dropout_of_conditions_needs_a_network_with_some(tmp_path, sd):
    assert load_config(sd, ["training.label_dropout=0.1"]).training.label_dropout == 0.1
    with pytest.raises(ConfigError, match="label_dropout 0.1 needs a network with labels or prompts"):
        load_config(ddpm_pipeline(tmp_path / "ddpm"), ["training.label_dropout=0.1"])


def test_latents_have_no_bound_in_bits(tmp_path):
    """Neither to measure nor to train by; the pixels of a pipeline have one."""
    latents, pixels = latent_pipeline(tmp_path / "latent"), ddpm_pipeline(tmp_path / "ddpm")
    with pytest.raises(UserError, match="nll measures the 256 levels of pixels; .*latent diffuses an autoencoder's"):
        check_likelihood(load_config(latents))
    bound = ["loss.variational=kl", "loss.lamda=0", "loss.num_consecutive_steps=0", "loss.reduce=mean"]
    with pytest.raises(ConfigError, match="loss.variational kl .* autoencoder's latents, which have none: set it to"):
        load_config(latents, bound)
    check_likelihood(load_config(pixels, bound))


def test_guidance_of_a_network_without_prompts_is_refused(tmp_path):
    config = load_config(ddpm_pipeline(tmp_path / "ddpm"))
    with pytest.raises(UserError, match="--guidance 3 needs a network with classes or prompts"):
        check_settings(SamplerSettings(timesteps=2, guidance=3.0), config, make_codec(config))        # as studies do
    with pytest.raises(UserError, match="--guidance 3 needs a network with classes or prompts"):
        next(Diffusion(config, "cpu").sample([0], timesteps=2, guidance=3.0))


def test_what_stands_for_no_prompt_is_part_of_a_pipelines_fingerprint(sdxl_copy):
    found = []
    for zeros in (True, False):
        change(sdxl_copy, "model_index.json", force_zeros_for_empty_prompt=zeros)
        found.append(pipeline_fingerprint(sdxl_copy, ENCODERS))
    write_json(sdxl_copy / "model_index.json", {})                                  # which means true
    assert found[0] == pipeline_fingerprint(sdxl_copy, ENCODERS) != found[1]
    (sdxl_copy / "model_index.json").unlink()
    assert found[0] == pipeline_fingerprint(sdxl_copy, ENCODERS)


def print_loaded():
    import_module("runners.sampling.job")
    print([name for name in ("diffusers", "transformers", "peft", "huggingface_hub") if name in sys.modules])


def test_nothing_of_it_is_imported_before_it_is_used():
    job = jobs.Job(print_loaded, [])                  # forked from a server that has the scripts imported
    assert job.wait() == 0 and job.text.strip() == "[]", job.text
