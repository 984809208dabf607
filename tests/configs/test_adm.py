"""ADM's recipes, what its configuration refuses, and the published command lines as configurations."""

import re

import pytest
import torch
import yaml

from configs import from_adm
from configs.from_adm import convert
from configs.reading import CONFIG_FOLDER
from configs.schema import Config, load_config, save_config, validate
from models import build_model
from utils.errors import ConfigError, UserError

RECIPES = sorted(path.stem for path in (CONFIG_FOLDER / "adm").glob("*.yml"))
# name: (data set, size, parameters, (processes, batch of each), gamma, channels, head, attention, dropout)
PUBLISHED = {
    "cifar10": ("CIFAR10", 32, 57_094_662, (2, 64), 0.15, 128, 32, "16,8", 0.3),
    "imagenet32": ("IMAGENET32", 32, 57_094_662, (4, 128), 0.1, 128, 32, "16,8", 0.3),
    "lsun_tower64": ("LSUN", 64, 295_136_454, (16, 16), 0.1, 192, 64, "32,16,8", 0.1),
    "celeba64": ("CELEBA", 64, 295_136_454, (16, 16), 0.1, 192, 64, "32,16,8", 0.1),
    "ffhq128": ("FOLDER", 128, 542_811_398, (16, 8), 0.1, 256, 64, "32,16,8", 0.1),
}
COMMON = ("--data_dir PATH --use_fp16 True --num_res_blocks 3 --resblock_updown True --use_new_attention_order True "
          "--learn_sigma True --diffusion_steps 1000 --noise_schedule cosine --rescale_learned_sigmas True "
          "--schedule_sampler loss-second-moment --lr 1e-4")
NETWORK = "--image_size 32 --num_channels 128 --num_head_channels 32 --attention_resolutions 16,8 --dropout 0.3"


def training_line(name: str, gamma: float) -> str:
    """DDPM-IP's, as its README has it; ImageNet32's leaves scale-shift to the default."""
    _, size, _, (processes, batch), _, channels, head, attention, dropout = PUBLISHED[name]
    shift = "" if name == "imagenet32" else "--use_scale_shift_norm True "
    return (f"mpiexec -n {processes} python scripts/image_train.py --input_pertub {gamma} {COMMON} --image_size {size} "
            f"--num_channels {channels} --num_head_channels {head} --attention_resolutions {attention} "
            f"--dropout {dropout} {shift}--batch_size {batch}")


def converted(command: str) -> Config:
    return validate(yaml.safe_load(convert(command)), "converted")


def first_line(command: str) -> str:
    return convert(command).splitlines()[0]


# Recipes

def test_every_recipe_is_checked():
    assert RECIPES == sorted(f"{name}{ip}" for name in [*PUBLISHED, "imagenet64"] for ip in ("", "_ip"))


@pytest.mark.parametrize("name", RECIPES)
def test_loads_and_survives_saving(name, tmp_path):
    config = load_config(f"adm/{name}.yml")
    save_config(config, tmp_path / "config.yml")
    assert load_config(tmp_path / "config.yml") == config


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("ip", ["", "_ip"])
def test_a_recipe_is_what_the_published_line_converts_to(name, ip):
    """But for the data set, the time to stop and how often something is shown."""
    dataset, _, parameters, (processes, batch), gamma, *_ = PUBLISHED[name]
    recipe, line = load_config(f"adm/{name}{ip}.yml"), converted(training_line(name, gamma if ip else 0))
    for section in ("model", "diffusion", "loss", "optim"):
        ours, theirs = getattr(recipe, section), getattr(line, section)
        assert ours == theirs, section
    assert (recipe.data.dataset, recipe.data.image_size) == (dataset, line.data.image_size)
    training = recipe.training
    assert training.global_batch_size == line.training.global_batch_size == processes * batch
    assert (training.time_sampler, training.ema, training.amp) == (
        line.training.time_sampler, line.training.ema, line.training.amp)
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(recipe).parameters()) == parameters
    assert (recipe.loss.input_perturbation > 0) == bool(ip)


@pytest.mark.parametrize("ip", ["", "_ip"])
def test_imagenet64_has_the_published_network(ip):
    config = load_config(f"adm/imagenet64{ip}.yml")
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(config).parameters()) == 295_904_454
    assert config.model.num_classes == 1000 and config.model.dropout == 0.1


def test_without_channel_mult_the_size_decides():
    def shapes(**model):
        config = Config(data={"dataset": "ZIP", "image_size": 64},
                        model={"arch": "adm", "num_channels": 32, "num_head_channels": 32, **model})
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in build_model(config).state_dict().items()}

    assert shapes() == shapes(channel_mult=[1, 2, 3, 4]) != shapes(channel_mult=[1, 2, 2, 2])


# What a configuration refuses

def refusal(**changes) -> str:
    raw = {"data": {"dataset": "ZIP", "image_size": 32},
           "model": {"arch": "adm", "learn_sigma": True, "num_head_channels": 32},
           "loss": {"num_consecutive_steps": 0, "lamda": 0.0, "reduce": "mean", "variational": "hybrid"}}
    validate(raw, "as it is")
    for key, value in changes.items():
        section, _, name = key.partition("__")
        raw.setdefault(section, {})[name] = value
    with pytest.raises(ConfigError) as error:
        validate(raw, "C")
    return str(error.value).removeprefix("C: ")


@pytest.mark.parametrize(("changes", "message"), [
    (dict(data__channels=1), "model.in_channels 3 must equal data.channels 1"),
    (dict(model__num_channels=48), "model.num_channels 48 * 1 (model.channel_mult) must be a multiple of 32"),
    (dict(model__channel_mult=[0.1]), "model.num_channels 128 * 0.1 (model.channel_mult) must be a multiple of 32"),
    (dict(model__num_head_channels=96), "model.num_head_channels 96 does not divide the 256 channels of an attention"),
    (dict(model__num_head_channels=-1, model__num_heads_upsample=3),
     "model.num_heads_upsample 3 does not divide the 256 channels of an attention"),
    (dict(data__image_size=48), "model.channel_mult has no default for data.image_size 48, only for 32, 64, 128, 256, "
                                "512; give a list such as [1, 2, 2]"),
    (dict(data__image_size=28, model__channel_mult=[1, 2, 2, 2]),
     "data.image_size 28 cannot be halved 3 times for model.channel_mult; nearest valid: 24 and 32"),
    (dict(loss__variational="none"), "model.learn_sigma: nothing trains the variances with loss.variational none; set "
                                     "it to hybrid or rescaled_hybrid"),
    (dict(model__learn_sigma=False), "loss.variational hybrid needs a network that learns variances; set it to none, "
                                     "or model.learn_sigma to true"),
    (dict(loss__reduce="sum"), "loss: variational hybrid is a mean over pixels; set loss.reduce to mean"),
    (dict(loss__variational="kl", loss__lamda=1.0, loss__num_consecutive_steps=2),
     "loss: variational kl has no other terms, lamda 1.0 is given; set loss.lamda to 0, or use hybrid"),
    (dict(data__uniform_dequantization=True), "loss.variational hybrid measures the 256 levels of pixels in [-1, 1]; "
                                              "it needs data.rescaled, and no dequantization"),
    (dict(diffusion__schedule="sigma"), "loss.variational hybrid needs diffusion.schedule discrete"),
    (dict(diffusion__set_alpha_to_one=False),
     "loss.variational hybrid needs a chain that ends at the image; set diffusion.set_alpha_to_one to true"),
    *((dict(diffusion__prediction=name), f"model.learn_sigma: diffusion.prediction {name} reads no variances; use "
                                         "epsilon, v_prediction or sample") for name in ("edm", "vp", "ve", "iddpm")),
    (dict(diffusion__beta_schedule="adm_linear", diffusion__num_diffusion_timesteps=20),
     "diffusion: diffusion.num_diffusion_timesteps 20: the last beta of adm_linear is 20 / T, which must stay below 1; "
     "give at least 21"),
    (dict(diffusion__schedule="sigma", diffusion__timestep_respacing="50"),
     "diffusion.timestep_respacing 50 is for diffusion.schedule discrete, not for sigma; leave it at null"),
    (dict(diffusion__timestep_respacing="25"), "training.sample_timesteps 50 exceeds the 25 steps of the chain; give 1 "
                                               "to 25"),
    (dict(diffusion__timestep_respacing=1, loss__num_consecutive_steps=2),
     "loss.num_consecutive_steps 2 exceeds diffusion.timestep_respacing 1"),
])
def test_refusals(changes, message):
    assert refusal(**changes) == message


def test_times_by_loss_need_steps():
    raw = {"data": {"dataset": "ZIP", "image_size": 32}, "model": {"arch": "unet"},
           "diffusion": {"schedule": "sigma"}, "training": {"time_sampler": "loss_second_moment"}}
    with pytest.raises(ConfigError, match="loss_second_moment counts the losses of steps; diffusion.schedule sigma"):
        validate(raw, "C")


def test_a_respacing_that_does_not_exist_is_a_line_about_the_configuration():
    from functions.schedule import make_schedule

    config = Config(data={"dataset": "ZIP", "image_size": 32}, diffusion={"timestep_respacing": "ddim300"},
                    model={"arch": "unet"})
    with pytest.raises(ConfigError, match="diffusion: timesteps ddim300: no integer stride gives 300 of 1000 steps"):
        make_schedule(config.diffusion)


# Published command lines

@pytest.mark.parametrize("name", PUBLISHED)
def test_training_lines_convert_without_an_edit(name):
    processes = PUBLISHED[name][3][0]
    line = training_line(name, 0.1)
    assert first_line(line) == f"# python train_ddp.py --config THIS.yml --num_process_per_node {processes}"
    config = converted(line.replace("mpiexec", "OPENAI_LOGDIR=/x mpirun --allow-run-as-root"))
    assert (config.data.dataset, config.data.root, config.data.labels) == ("FOLDER", "PATH", "auto")
    assert config == converted(line) and config.training.n_epochs == 1_000_000 and config.training.max_steps is None


def test_the_flags_alone_and_on_several_lines():
    line = training_line("cifar10", 0.15)
    flags = line.partition("image_train.py ")[2]
    assert converted(flags).model == converted(line).model
    assert converted(line.replace(" --", " \\\n  --")) == converted(line)
    assert converted(line.replace("--lr 1e-4", "--lr=1e-4")) == converted(line)


def test_a_sampling_line():
    line = (f"mpiexec -n 4 python scripts/image_sample.py {NETWORK} --num_res_blocks 3 --resblock_updown True "
            "--use_new_attention_order True --learn_sigma True --diffusion_steps 1000 --noise_schedule cosine "
            "--rescale_learned_sigmas True --timestep_respacing 100 --model_path ADM_IP_015.pt --batch_size 256 "
            "--num_samples 50000 --use_scale_shift_norm True")
    assert first_line(line) == (
        "# python generate.py --config THIS.yml --weights ADM_IP_015.pt --timesteps 100 --skip_type respace "
        "--batch_size 256 --num_process_per_node 4 --sample_type ddpm_noisy --var_type learned --num_samples 50000 "
        "--save npz --no-fid")
    assert "--num_process_per_node 4 " in first_line(line.replace("mpiexec -n", "mpiexec \\\n -n"))
    assert converted(line).model == load_config("adm/cifar10_ip.yml").model
    assert converted(line).diffusion == load_config("adm/cifar10_ip.yml").diffusion
    assert "--eps_scaler 1.00171234" in first_line(f"{line} --eps_scaler 1.00171234")
    assert "--eps_scaler" not in first_line(f"{line} --eps_scaler 0.0")          # ADM-ES's default
    assert "--sample_type generalized --clip_denoised --num_samples" in first_line(f"{line} --use_ddim True")
    assert "--no-clip_denoised" in first_line(f"{line} --clip_denoised n")
    assert first_line(f"{line} --use_fp16 yes").endswith("--amp auto")
    assert "--classifier c.pt --classifier_scale 0.5" in first_line(
        f"{line} --classifier_path c.pt --classifier_scale 0.5 --classifier_depth 4")


def test_a_likelihood_line():
    line = f"python scripts/image_nll.py {NETWORK} --learn_sigma True --model_path m.pt --num_samples 500"
    assert first_line(line) == ("# python diagnose.py nll --config THIS.yml --weights m.pt --timesteps 1000 --skip_type"
                                " respace --batch_size 16 --num_images 500 --npz")
    assert all(first_line(f"{line} --eps_scaler {neutral}") == first_line(line) for neutral in ("0.0", "1"))
    assert "--num_images 1000 " in first_line(line.replace("--num_samples 500", ""))            # image_nll.py's default


def test_every_flag_ends_up_somewhere():
    line = ("scripts/image_train.py --image_size 64 --channel_mult 1,2 --num_heads 2 --num_heads_upsample 8 "
            "--class_cond True --use_checkpoint True --noise_schedule linear --timestep_respacing 40 --use_kl True "
            "--predict_xstart True --rescale_timesteps True --lr 3e-4 --weight_decay 0.05 --lr_anneal_steps 500 "
            "--microbatch 2 --batch_size 8 --ema_rate 0.9999,0.99 --log_interval 7 --save_interval 9 --learn_sigma 1 "
            "--diffusion_steps 4000 --resume_checkpoint model010000.pt --fp16_scale_growth 1e-3")
    config = converted(line)
    model, training, diffusion = config.model, config.training, config.diffusion
    assert (model.channel_mult, model.num_heads, model.num_heads_upsample, model.num_classes) == ((1, 2), 2, 8, 1000)
    assert (diffusion.beta_schedule, diffusion.num_diffusion_timesteps, diffusion.timestep_respacing) == (
        "adm_linear", 4000, "40")
    assert (diffusion.prediction, diffusion.rescale_timesteps) == ("sample", True)
    assert (config.loss.variational, config.data.labels) == ("rescaled_kl", "filenames")
    assert (training.micro_batch_size, training.global_batch_size, training.max_steps) == (2, 8, 500)
    assert [average.rate for average in training.ema] == [0.9999, 0.99]
    assert (training.log_freq, training.snapshot_freq, training.sample_timesteps) == (7, 9, 40)
    assert training.activation_checkpointing and training.amp == "off"
    assert (config.optim.lr, config.optim.weight_decay, config.optim.lr_schedule) == (3e-4, 0.05, "linear")
    assert "--init_from model010000.pt" in first_line(line) and "begins at step 0" in convert(line)
    assert converted(f"{line} --num_classes 7").model.num_classes == 7
    assert converted(f"{line} --input_pertub 0.1").model.num_classes == 10           # DDPM-IP's constant
    without = line.replace("--log_interval 7", "")
    assert [converted(each).training.log_freq for each in (without, f"{without} --input_pertub 0.1")] == [10, 100]


@pytest.mark.parametrize(("command", "message"), [
    ("--num_chanels 3", r"'--num_chanels' is no flag of guided-diffusion, DDPM-IP or ADM-ES; known: attention_resolu"),
    ("--num_channels", "--num_channels needs a value"),
    ("--learn_sigma --dropout 0.1", "--learn_sigma needs a value"),
    ("--learn_sigma maybe", "--learn_sigma 'maybe' must be True or False"),
    ("--num_channels 1.5", "--num_channels '1.5' must be a whole number"),
    ("--channel_mult 1,x", "--channel_mult '1,x' must be whole numbers such as 16,8"),
    ("--noise_schedule sqrt", "--noise_schedule 'sqrt' is unknown; known: linear, cosine"),
    ("--image_size 48", "--image_size 48 has no default for --channel_mult; sizes that have: 32, 64, 128, 256, 512"),
    ("image_train.py --eps_scaler 1.01", "--eps_scaler in a training command: ADM-ES takes it as gamma"),
    ("image_nll.py --eps_scaler 1.017", "--eps_scaler 1.017 in a likelihood"),
    ("python scripts/classifier_train.py --lr 1e-4", "classifier_train.py has no counterpart here"),
    ("scripts/super_res_sample.py --batch_size 4", "super_res_sample.py has no counterpart here"),
    ("--num_channels 33", r"these flags: model.num_channels 33 \* 1 .* must be a multiple of 32"),
    ('--data_dir "x', "not a command: No closing quotation"),
])
def test_what_does_not_convert_is_one_line(command, message):
    with pytest.raises(UserError, match=message) as error:
        convert(command)
    assert "\n" not in str(error.value)


def test_as_a_command(capsys):
    assert from_adm.main([training_line("cifar10", 0.15)]) == 0
    assert capsys.readouterr().out == convert(training_line("cifar10", 0.15))
    assert from_adm.main(training_line("cifar10", 0.15).split()) == 0              # without quotes around it
    assert from_adm.main(["--nonsense"]) == 2
    error = capsys.readouterr().err
    assert re.match("'--nonsense' is no flag", error) and error.count("\n") == 1
