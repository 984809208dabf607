"""EDM networks through the scripts: trained with every remedy, resumed, sampled; published files without a config."""

import io
import json
import re
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diagnose
import generate
import train_ddp
from functions.denoiser import Denoiser
from functions.ode import heun_steps
from functions.prediction import PREDICTIONS
from functions.rng import SeededNoise
from functions.schedule import SigmaSchedule
from functions.timesteps import sampling_times
from models import EMA, decay_of
from models.formats.edm import read_snapshot
from runners.diffusion import Diffusion
from runners.sampling.weights import local_weights
from runners.training.optimizer import make_lr_schedule
from runners.training.state import TrainingState
from tests.edm_cases import SNAPSHOT, build, one
from tests.edm_writer import network, torch_save
from tests.faults import jobs
from tests.runners.test_training import assert_same, lines, state
from utils.errors import DataError, UserError

# edm/cifar10_ddpmpp_cond.yml on the digits, with a network of milliseconds.
SMALL = ["--config", "edm/cifar10_ddpmpp_cond.yml", "--device", "cpu", "--doc", "digits", "--verbose", "critical",
         "--data.dataset", "DIGITS", "--data.image_size", "8", "--data.channels", "1", "--model.in_channels", "1",
         "--model.model_channels", "32", "--model.channel_mult", "[1,1]", "--model.num_blocks", "1",
         "--model.attn_resolutions", "[]", "--training.global_batch_size", "8", "--training.total_images", "64",
         "--training.sample_num", "0", "--training.log_freq", "1", "--optim.warmup_images", "40"]
HARD = ["--num_consecutive_steps", "2", "--lamda", "1", "--input_perturbation", "0.1",
        "--training.label_dropout", "0.2"]


def train(exp, *flags):
    return train_ddp.main([*SMALL, "--exp", str(exp), *flags])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    exp = tmp_path_factory.mktemp("edm")
    assert train(exp, *HARD) == 0
    return exp


def test_length_learning_rate_and_averages_follow_images(trained):
    found = lines(trained)
    assert [line["step"] for line in found][-1] == 8               # 64 images in batches of 8
    assert [line["lr"] for line in found[:6]] == pytest.approx([0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    stored = state(trained)
    assert stored["config"]["training"]["total_images"] == 64
    assert any(not torch.equal(stored["ema"][name], tensor) for name, tensor in stored["model"].items())


def test_resume_is_exact_with_augmentation_classes_and_remedies(trained, tmp_path):
    assert train(tmp_path, *HARD, "--max_steps", "5") == 0
    assert train(tmp_path, *HARD, "--resume_training") == 0
    assert_same(state(trained), state(tmp_path))
    assert lines(trained) == lines(tmp_path)


def test_two_ranks_train_what_one_does_in_shards(tmp_path):
    shards = [*HARD, "--training.micro_batch_size", "4", "--max_steps", "3"]
    assert train(tmp_path / "one", *shards) == 0
    ranks = jobs.ranks("train_ddp", [*SMALL, *shards, "--exp", str(tmp_path / "two")])
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.text for rank in ranks]
    one_, two = state(tmp_path / "one")["model"], state(tmp_path / "two")["model"]
    for name, tensor in one_.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("remedies", [[], HARD], ids=["plain", "all remedies"])
@pytest.mark.parametrize("name", ["cifar10_ddpmpp", "cifar10_ncsnpp_ve", "cifar10_ddpmpp_vp"])
def test_the_loss_falls(tmp_path, name, remedies):
    more = ["--config", f"edm/{name}.yml", "--training.total_images", "320", "--optim.warmup_images", "0",
            "--optim.lr", "2e-3", "--data.augment", "0", "--training.micro_batch_size", "8", "--max_steps", "40"]
    if name.startswith("cifar10_ncsnpp"):
        more += ["--model.resample_filter", "[1,3,3,1]"]
    flags = [flag for flag in remedies if not flag.startswith("--training.label")][:6]
    assert train(tmp_path, *more, *flags) == 0
    losses = [line["loss"] for line in lines(tmp_path)]
    assert sum(losses[-10:]) < 0.92 * sum(losses[:10])


@pytest.mark.parametrize("flags", [["--sample_type", "heun", "--timesteps", "6", "--churn", "2,0.05,50,1.003"],
                                   ["--sample_type", "euler", "--timesteps", "9", "--eps_scaler", "1.0034"],
                                   ["--timesteps", "9"], ["--sample_type", "dpmpp_2m", "--timesteps", "6"],
                                   ["--sample_type", "ddpm_noisy", "--timesteps", "9", "--skip_type", "ve"],
                                   ["--sample_type", "heun", "--timesteps", "5", "--ode_time", "vp", "--ode_scale",
                                    "vp", "--skip_type", "vp", "--guidance", "1.5"]], ids=lambda flags: flags[1])
def test_every_sampler_draws_class_by_class(trained, tmp_path, flags):
    common = ["--exp", str(trained), "--doc", "digits", "--device", "cpu", "--verbose", "critical", "--no-fid"]
    assert generate.main([*common, *flags, "-i", str(tmp_path / "images"), "--num_samples", "20", "--grid", "20",
                          "--classes", "0-9"]) == 0
    assert len(list((tmp_path / "images").glob("*.png"))) == 20 and (tmp_path / "images_grid.png").exists()


def test_norms_of_the_predicted_noise_by_level(trained):
    assert diagnose.main(["eps-norm", "--exp", str(trained), "--doc", "digits", "--device", "cpu", "--num_images", "8",
                          "--sample_type", "heun", "--timesteps", "5", "--verbose", "critical"]) == 0
    (table,) = (trained / "diagnose" / "digits").glob("eps-norm-*.csv")
    rows = [line.split(",") for line in table.read_text().splitlines()]
    t, evaluation = rows[0].index("t"), rows[0].index("evaluation")
    assert [float(row[t]) for row in rows[1:] if row[evaluation] == "first"] == pytest.approx(
        sampling_times(SigmaSchedule(), 5))
    assert len([row for row in rows if row[evaluation] == "corrector"]) == 4            # the last step has none


@pytest.fixture
def archive(tmp_path):
    """Six labelled images of 16 x 16 pixels, as EDM's tool packs them."""
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as file:
        for i in range(6):
            picture = io.BytesIO()
            Image.fromarray(np.random.RandomState(i).randint(0, 256, (16, 16, 3), np.uint8)).save(picture, "png")
            file.writestr(f"{i}.png", picture.getvalue())
        file.writestr("dataset.json", json.dumps({"labels": [[f"{i}.png", i % 5] for i in range(6)]}))
    return path


def test_the_norms_of_a_published_network_need_no_run(tmp_path, archive, capsys):
    flags = ["--exp", str(tmp_path), "--weights", str(SNAPSHOT), "--device", "cpu", "--verbose", "critical",
             "--data.root", str(archive), "--num_images", "6", "--sample_type", "euler", "--timesteps", "4"]
    assert diagnose.main(["fit-eps-scaler", *flags, "--model", "constant"]) == 0
    assert "edm_snapshot_nosource  eps_scaler 1.0" in capsys.readouterr().out
    job = diagnose.Job(diagnose.parse(["fit-eps-scaler", *flags]))
    assert job.command("edm_snapshot_nosource", eps_scaler="1.01").startswith(
        f"python generate.py --exp {tmp_path} --weights {SNAPSHOT} --timesteps 4")
    assert diagnose.main(["eps-norm", *flags, "--doc", "a", "b"]) == 2
    assert "is one network, --doc names 2 runs" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- published files


def sample(tmp_path, *flags):
    return generate.main(["--exp", str(tmp_path), "--weights", str(SNAPSHOT), "--device", "cpu", "--no-fid",
                          "--verbose", "critical", "--num_samples", "2", *flags])


def test_a_snapshot_needs_no_configuration(tmp_path):
    assert sample(tmp_path, "--sample_type", "heun", "--timesteps", "5") == 0
    folder = tmp_path / "image_samples" / "edm_snapshot_nosource"
    assert sorted(path.name for path in folder.iterdir()) == ["000000.png", "000001.png", "manifest.json"]
    assert json.loads((folder / "manifest.json").read_text())["diffusion"]["prediction"] == "edm"


def test_a_snapshot_samples_as_its_parts_do():
    diffusion = Diffusion.from_weights(SNAPSHOT, "cpu")
    assert (diffusion.weights.format, diffusion.weights.kind) == ("edm", "ema")
    types = set()
    (batch,) = diffusion.sample([3, 4], sample_type="heun", timesteps=5, classes="2",
                                callback=lambda index, t, x, x0, eps: types.add(x.dtype))
    assert types == {torch.float64} and batch.images.dtype == torch.float32
    model = build(one("networks", "snapshot"))
    model.load_state_dict(read_snapshot(SNAPSHOT).state)
    denoiser = Denoiser(model, SigmaSchedule(), PREDICTIONS["edm"], {"labels": torch.tensor([2, 2])})
    x = SeededNoise([3, 4]).randn((2, 3, 16, 16)).double()
    out = heun_steps(denoiser, 80 * x, sampling_times(SigmaSchedule(), 5))
    torch.testing.assert_close(batch.images, ((out + 1) / 2).clamp(0, 1).float(), rtol=1e-4, atol=1e-4)


def test_a_snapshot_on_ddpms_steps(tmp_path):
    assert sample(tmp_path, "--diffusion.schedule", "discrete", "--timesteps", "5", "--skip_type", "linspace") == 0


def test_a_dry_run_says_what_the_file_says(tmp_path, capsys):
    assert sample(tmp_path, "--dry_run") == 0
    text = capsys.readouterr().out
    assert "EDMPrecond around SongUNet" in text and "P_mean -1.2" in text and "p 0.12" in text
    assert "datasets/tiny.zip" in text and "(ema, " in text


def test_a_configuration_that_contradicts_the_file_is_refused(tmp_path, capsys):
    sections = Diffusion.from_weights(SNAPSHOT, "cpu").config.model_dump(mode="json")
    sections["diffusion"]["prediction"] = "vp"
    (tmp_path / "c.yml").write_text(json.dumps(sections))
    assert sample(tmp_path, "--config", str(tmp_path / "c.yml")) == 2
    assert "diffusion.prediction is 'edm' there, 'vp' here" in capsys.readouterr().err


def test_training_can_start_from_a_snapshot(tmp_path, archive):
    sections = Diffusion.from_weights(SNAPSHOT, "cpu").config.model_dump(mode="json")
    sections["data"].update(root=str(archive), augment=0.12)
    (tmp_path / "c.yml").write_text(json.dumps(sections))
    assert train_ddp.main(["--config", str(tmp_path / "c.yml"), "--exp", str(tmp_path), "--init_from", str(SNAPSHOT),
                           "--device", "cpu", "--verbose", "critical", "--training.batch_size", "4", "--max_steps", "1",
                           "--training.sample_num", "0", "--optim.lr", "1e-6"]) == 0
    trained = torch.load(tmp_path / "logs" / "c" / "ckpt.pth", weights_only=True)["model"]
    for name, tensor in read_snapshot(SNAPSHOT).state.items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=2e-6)


def test_a_training_state_is_begun_from_and_not_resumed(tmp_path, archive, capsys):
    diffusion = Diffusion.from_weights(SNAPSHOT, "cpu")
    config, folder = tmp_path / "c.yml", tmp_path / "logs" / "00000-edm"
    config.write_text(json.dumps(diffusion.config.replace("data.root", str(archive)).model_dump(mode="json")))
    folder.mkdir(parents=True)
    given = one("networks", "snapshot")["init_kwargs"]
    for number in (9, 10):
        (folder / f"training-state-{number:06d}.pt").write_bytes(torch_save(
            {"net": network(diffusion.model, "EDMPrecond", given), "optimizer_state": {"state": {}}}))
    flags = ["--config", str(config), "--exp", str(tmp_path), "--device", "cpu", "--verbose", "critical", "--max_steps",
             "1", "--training.batch_size", "4", "--training.sample_num", "0", "--optim.lr", "1e-6", "--data.augment",
             "0.12"]
    assert train_ddp.main([*flags, "--doc", "00000-edm", "--resume_training"]) == 2
    assert f"another --doc with --init_from {folder}/training-state-000010.pt" in capsys.readouterr().err
    assert train_ddp.main([*flags, "--doc", "new", "--init_from", str(folder / "training-state-000010.pt")]) == 0
    trained = torch.load(tmp_path / "logs" / "new" / "ckpt.pth", weights_only=True)
    assert trained["step"] == 1
    for name, tensor in diffusion.model.state_dict().items():
        torch.testing.assert_close(trained["model"][name], tensor, rtol=0, atol=2e-6)


def test_weights_of_another_network_are_refused(tmp_path):
    with pytest.raises(DataError, match="of another shape"):
        Diffusion.from_weights(SNAPSHOT, "cpu", ["model.model_channels=64"])
    other = tmp_path / "weights.pth"
    torch.save({"a": torch.ones(1)}, other)
    with pytest.raises(UserError, match="does not say what its network is"):
        Diffusion.from_weights(other, "cpu")


def test_levels_that_the_network_does_not_know_are_said(tmp_path, capsys):
    assert sample(tmp_path, "--timesteps", "2", "--diffusion.sigma_max", "50", "--sigma_max", "100") == 0
    assert "the chain starts from level 50, not from --sigma_max 100" in capsys.readouterr().out
    for flags, message in ((["--skip_type", "uniform", "--sigma_max", "3"], "sigma_max is for --skip_type edm and"),
                           (["--skip_type", "vp", "--sigma_min", "0.5"], "is too high for the vp levels"),
                           (["--alpha", "0.5"], "alpha is for heun, not for generalized"),
                           (["--sample_type", "heun", "--alpha", "2"], "--alpha 2.0: input should be less than"),
                           (["--sample_type", "heun", "--ode_time", "cos"], "--ode_time 'cos': input should be")):
        assert sample(tmp_path, "-i", "none", *flags) == 2
        assert message in capsys.readouterr().err


def test_a_file_by_url_without_a_network_is_a_line(tmp_path, monkeypatch, capsys):
    def unreachable(url, timeout):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    flags = ["--exp", str(tmp_path), "--device", "cpu", "--no-fid", "--verbose", "critical", "--num_samples", "1",
             "--timesteps", "2", "--weights", "https://host/edm/snapshot.pkl?x=1"]
    assert generate.main(flags) == 2
    message = capsys.readouterr().err
    target = Path(re.search(r"put it at (\S+)", message)[1])
    assert "cannot be fetched" in message and target.is_relative_to(tmp_path / "hub") and target.name == "snapshot.pkl"
    target.parent.mkdir(parents=True)
    target.write_bytes(SNAPSHOT.read_bytes())
    assert generate.main(flags) == 0                           # from the cache, without a network


def test_each_url_has_its_own_file_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(url.encode()))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    urls = [f"https://{rest}" for rest in ("host/a/ema_10.pt", "host/b/ema_10.pt", "other/a/ema_10.pt",
                                           "host/a/ema_10.pt?revision=2")]
    for url in urls + urls:
        assert local_weights(url).read_text() == url and local_weights(url).name == "ema_10.pt"


# ---------------------------------------------------------------------------------------------------- training's parts


def test_learning_rates_are_published():
    from configs.training import Optim

    for seen, lr, ramp, expected in one("misc", "lr")["rows"]:
        if ramp:                                               # upstream's first step has lr 0 even without a ramp
            config = Optim(lr=lr, warmup_images=int(ramp * 1000))
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr)
            factor = make_lr_schedule(optimizer, config, 10**9, global_batch=1).lr_lambdas[0]
            assert lr * factor(int(seen)) == pytest.approx(expected, rel=1e-9)


def test_averages_are_published():
    from configs.training import Average

    for seen, batch, half_life, ramp, expected in one("misc", "ema")["rows"]:
        if half_life and seen % batch == 0:
            average = Average(half_life=half_life * 1000, ramp_up=max(0.0, ramp))
            assert decay_of(average, int(batch))(int(seen // batch) + 1) == pytest.approx(expected, rel=1e-9, abs=1e-30)
    model = torch.nn.Linear(1, 1)
    follower = EMA(model, decay_of(Average(half_life=100), 10))
    with torch.no_grad():
        model.weight.fill_(7.0)
    follower.update(model)
    assert follower.module.weight.item() == 7                  # at first the average is the network itself


@pytest.mark.parametrize("replace", [False, True])
def test_gradients_that_are_not_finite(replace):
    from configs.schema import Config

    config = Config(data={"dataset": "DIGITS", "image_size": 8, "channels": 1}, model={"in_channels": 1, "out_ch": 1},
                    optim={"optimizer": "SGD", "lr": 1.0, "beta1": 0.0, "replace_non_finite": replace})
    model = torch.nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    training = TrainingState(model, config, 10)
    model.weight.grad = torch.tensor([[float("nan"), float("inf"), float("-inf"), 2.0]])
    _, skipped = training.update()
    assert bool(skipped) is not replace
    assert model.weight.tolist() == ([[0.0, -1e5, 1e5, -2.0]] if replace else [[0.0] * 4])
    scaled = TrainingState(model, config, 10, loss_scaling=True)
    scaled.scaler.scale(torch.ones(()))                         # which makes its scale
    model.weight.grad = torch.full((1, 4), float("inf"))
    assert bool(scaled.update()[1]), "skipped by the scaler, and counted"
