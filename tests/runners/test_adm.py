"""ADM through the scripts: training with learned variances and times by loss, sampling, guidance, likelihoods."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import diagnose
import generate
import train_ddp
from configs.sampling import SamplerSettings
from configs.schema import load_config, validate
from functions.guidance import classifier_gradient
from functions.losses import sequence_aware_loss
from functions.variational import Transitions, with_bound
from models.adm_classifier import ADMClassifier, load_classifier
from runners.diffusion import Diffusion
from runners.training.objective import Objective
from runners.training.state import TrainingState
from tests.adm import denoiser_of, network, of_kind, relative_error, schedule_of
from tests.faults import jobs
from utils.errors import DataError, UserError

# Trains in milliseconds; so few steps that every one soon has its ten losses.
SMALL = {
    "data": {"dataset": "DIGITS", "image_size": 8, "channels": 1, "random_flip": False, "num_workers": 0},
    "model": {"arch": "adm", "in_channels": 1, "num_channels": 32, "channel_mult": [1], "num_res_blocks": 1,
              "attention_resolutions": [8], "num_head_channels": 16, "learn_sigma": True, "num_classes": 10,
              "dropout": 0.1},
    "diffusion": {"beta_schedule": "cosine", "num_diffusion_timesteps": 8},
    "loss": {"num_consecutive_steps": 2, "lamda": 1.0, "input_perturbation": 0.15, "reduce": "mean",
             "variational": "rescaled_hybrid"},
    "training": {"global_batch_size": 32, "time_sampler": "loss_second_moment", "label_dropout": 0.1, "sample_num": 0,
                 "sample_timesteps": 4, "log_freq": 1, "ema": 0.9},
    "optim": {"optimizer": "AdamW", "lr": 1e-3},
}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.yml"
    path.write_text(yaml.safe_dump(SMALL))
    return str(path)


def flags(config_file, exp, *more):
    return ["--config", config_file, "--exp", str(exp), "--device", "cpu", "--verbose", "critical", *map(str, more)]


@pytest.fixture(scope="module")
def exp(config_file, tmp_path_factory):
    """A run "small" of 40 steps."""
    folder = tmp_path_factory.mktemp("exp")
    assert train_ddp.main(flags(config_file, folder, "--max_steps", 40)) == 0
    return folder


def metrics(exp) -> list[dict]:
    return [json.loads(line) for line in (exp / "logs" / "small" / "metrics.jsonl").read_text().splitlines()]


def test_all_terms_of_the_loss_fall(exp):
    lines = metrics(exp)
    assert lines[0].keys() >= {"loss", "loss_base", "loss_sequence", "loss_bits"}
    for key in ("loss", "loss_base", "loss_sequence"):
        assert lines[-1][key] < 0.7 * lines[0][key], key
    stored = torch.load(exp / "logs" / "small" / "ckpt.pth", weights_only=True)["times"]
    assert (stored["counts"] == 10).all() and (stored["losses"] > 0).all()


def test_the_history_holds_the_unweighted_losses_of_all_shards_in_their_order(config_file, tmp_path, monkeypatch):
    seen, original = [], Objective.loss

    def loss(self, denoiser, batch):
        terms = original(self, denoiser, batch)
        seen.append((batch.t, terms.total.detach(), batch.importance))
        return terms

    monkeypatch.setattr(Objective, "loss", loss)
    assert train_ddp.main(flags(config_file, tmp_path, "--max_steps", 6, "--training.micro_batch_size", 8)) == 0
    assert len(seen) == 6 * 4 and any((importance != 1).any() for _, _, importance in seen)
    t, losses = (torch.cat(column) for column in list(zip(*seen, strict=True))[:2])
    stored = torch.load(tmp_path / "logs" / "small" / "ckpt.pth", weights_only=True)["times"]["losses"]
    for step in range(8):
        assert torch.equal(stored[step], losses[t == step][-10:].double())
    logged = [line["loss"] for line in metrics(tmp_path)]
    weighted = [(importance * loss).mean().item() for _, loss, importance in seen]           # what is differentiated
    assert logged == pytest.approx([sum(weighted[i:i + 4]) / 4 for i in range(0, 24, 4)], rel=1e-5)


def test_held_out_losses_have_the_same_times_whatever_the_history(exp, config_file, tmp_path):
    """Of a trained network: the loss of a fresh one, which gives 0, is the same at all times."""
    held_out = "--training.validation_freq", 2, "--training.validation_num", 64, "--data.validation_fraction", 0.1
    assert train_ddp.main(flags(config_file, tmp_path, "--max_steps", 6, "--optim.lr", 1e-12, *held_out,
                                "--init_from", exp / "logs" / "small" / "ckpt.pth")) == 0
    found = [line["validation_loss"] for line in metrics(tmp_path) if "validation_loss" in line]
    assert len(found) == 3 and found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_a_linear_rate_ends_at_zero_after_the_last_step(config_file, tmp_path):
    assert train_ddp.main(flags(config_file, tmp_path, "--training.max_steps", 4, "--optim.lr_schedule", "linear")) == 0
    rates = [line["lr"] for line in metrics(tmp_path)]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


@pytest.mark.parametrize("sampler", [
    ("--sample_type", "ddpm_noisy", "--var_type", "learned", "--timesteps", "5", "--skip_type", "respace"),
    ("--timesteps", "ddim4", "--classes", "0-9", "--guidance", "2"),
    ("--sample_type", "ddpm_noisy", "--var_type", "learned", "--timesteps", "2,1", "--eps_scaler", "0.001,1.01")])
def test_samples(exp, sampler, tmp_path, config_file):
    assert generate.main(flags(config_file, exp, "--doc", "small", "-i", tmp_path / "x", "--num_samples", 6, "--no-fid",
                               "--batch_size", 4, *sampler)) == 0
    assert len(list((tmp_path / "x").glob("*.png"))) == 6
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
    assert manifest["model"] == {"arch": "adm"}


def test_an_npz_holds_the_labels_as_guided_diffusion_writes_them(exp, config_file, tmp_path):
    for classes, expected in (("3,7", [7, 7, 3, 7]), ("none", None)):
        folder = tmp_path / classes
        assert generate.main(flags(config_file, exp, "--timesteps", 2, "--seeds", "5,1-3", "--classes", classes,
                                   "--save", "npz", "--no-fid", "--grid", 0, "-i", folder)) == 0
        with np.load(folder / "samples_4x8x8x1.npz") as stored:
            assert stored.files == ["arr_0"] + ["arr_1"] * (expected is not None)
            if expected:
                assert stored["arr_1"].dtype == np.int64 and stored["arr_1"].tolist() == expected


def test_fixed_variances_are_said_beside_learned_ones(exp, config_file, tmp_path, capsys):
    assert generate.main(flags(config_file, exp, "--doc", "small", "-i", tmp_path / "x", "--num_samples", 1, "--no-fid",
                               "--sample_type", "ddpm_noisy", "--timesteps", 2)) == 0
    assert "this network has learned its variances, which --var_type learned uses" in capsys.readouterr().out


def test_dry_runs(exp, config_file, tmp_path, capsys):
    assert train_ddp.main(flags(config_file, tmp_path / "e", "--dry_run")) == 0
    assert generate.main(flags(config_file, exp, "--doc", "small", "--dry_run", "--no-fid", "--timesteps", 4,
                               "--sample_type", "ddpm_noisy", "--var_type", "learned")) == 0
    assert "variational=rescaled_hybrid" in capsys.readouterr().out and not (tmp_path / "e").exists()


def test_weights_of_another_network_are_one_line(exp, tmp_path, config_file, caplog, capsys):
    """Those of a published file tell their settings; the run's own names are guided-diffusion's."""
    state = torch.load(exp / "logs" / "small" / "ckpt.pth", weights_only=True)["ema"]
    torch.save(state, tmp_path / "ema_0.9999_000040.pt")
    files = ("--weights", tmp_path / "ema_0.9999_000040.pt", "-i", tmp_path / "x", "--num_samples", 2, "--no-fid",
             "--timesteps", 2)
    assert generate.main(flags(config_file, tmp_path, *files)) == 0
    assert generate.main(flags(config_file, tmp_path, *files, "--model.num_classes", 7)) == 3
    assert "num_classes is 10 in the file, 7 in the configuration" in capsys.readouterr().err + caplog.text


# Killed at any step, with a history

@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_run_goes_on_with_its_history_bit_for_bit(config_file, tmp_path, world):
    def start(folder, *more, faults=None):
        argv = flags(config_file, tmp_path / folder, "--doc", "digits", "--training.micro_batch_size", 16,
                     "--training.max_steps", 9, *jobs.EVERY_TWO, *more)
        if world == 1:
            return [jobs.Job("train_ddp", argv, (faults or {}).get(0, ()))]
        return jobs.ranks("train_ddp", argv, world, faults or {})

    whole = start("whole")
    step = 3 + torch.randint(5, ()).item()                                  # times are drawn by the losses from 3 on
    broken = start("broken", faults={world - 1: jobs.killed_after(step)})
    assert all(job.wait() for job in broken)
    assert [job.wait() for job in start("broken", "--resume_training")] == [0] * world
    assert [job.wait() for job in whole] == [0] * world
    assert jobs.same(jobs.state(tmp_path / "whole"), jobs.state(tmp_path / "broken")), f"killed after step {step}"
    assert jobs.metrics(tmp_path / "whole") == jobs.metrics(tmp_path / "broken")


def test_two_processes_train_as_one(config_file, tmp_path):
    """The same shards, so the same times, losses and history; weights to the rounding of another sum."""
    argv = ["--doc", "digits", "--training.micro_batch_size", 16, "--max_steps", 9]
    one = jobs.Job("train_ddp", flags(config_file, tmp_path / "1", *argv))
    two = jobs.ranks("train_ddp", flags(config_file, tmp_path / "2", *argv))
    assert [job.wait() for job in [one, *two]] == [0, 0, 0]
    a, b = (jobs.state(tmp_path / name) for name in "12")
    assert (a["times"]["counts"] == 10).all() and torch.equal(a["times"]["counts"], b["times"]["counts"])
    assert torch.allclose(a["times"]["losses"], b["times"]["losses"], rtol=1e-4)
    assert all(torch.allclose(a["model"][name], b["model"][name], rtol=1e-3, atol=1e-5) for name in a["model"])


# The published training loop

@pytest.mark.parametrize("case", of_kind("training_loop"), ids=lambda case: "four steps")
def test_the_published_training_loop(case):
    """Theirs sums the gradients of microbatches and sets the rate a step late; moments do not see the first."""
    settings, known = case["settings"], schedule_of(case["diffusion"])
    model, transitions = network(case).train(), Transitions(known, range(known.num_timesteps))
    config = validate({"data": {"dataset": "ZIP", "image_size": 16}, "model": {"arch": "unet"},
                       "training": {"ema": [float(rate) for rate in settings["ema_rate"].split(",")]},
                       "optim": {"optimizer": "AdamW", "lr": settings["lr"],
                                 "weight_decay": settings["weight_decay"]}}, "training loop")
    state = TrainingState(model, config, 4)
    denoiser = denoiser_of(case | {"y": None}, model, known)
    for step, expected in enumerate(case["steps"]):
        for group in state.optimizer.param_groups:
            group["lr"] = expected["lr"]
        for rows in torch.arange(settings["batch_size"]).split(settings["microbatch"]):
            x0, noise, xi, t, weights = (case[key][step][rows] for key in ("x0", "noise", "xi", "t", "weights"))
            terms = sequence_aware_loss(denoiser, x0, t, noise[None], num_consecutive_steps=0, lamda=0.0, reduce="mean",
                                        input_perturbation=case["diffusion"]["input_pertub"],
                                        perturbation_noise=xi[None])
            terms = with_bound(terms, "rescaled_hybrid", denoiser, transitions, x0, t)
            (weights * terms.total).mean().backward()
        grad_norm, _ = state.update()
        assert grad_norm.item() == pytest.approx(expected["grad_norm"], rel=1e-4)
        now = {"model": model.state_dict(),
               **{f"ema_{average.rate:g}": ema.state_dict()
                  for average, ema in zip(config.training.ema, state.averages, strict=True)}}
        for kind, state_dict in now.items():
            for name, tensor in expected[kind].items():
                assert relative_error(state_dict[name], tensor) < 1e-4, (kind, name)


# Classifier guidance

@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory):
    torch.manual_seed(0)
    classifier = ADMClassifier(image_size=8, in_channels=1, num_channels=64, num_res_blocks=1, channel_mult=[1, 1],
                               attention_resolutions=[8], resblock_updown=True, num_outputs=10)
    path = tmp_path_factory.mktemp("classifier") / "8x8_classifier.pt"
    torch.save(classifier.state_dict(), path)
    return path


def test_a_classifier_comes_from_its_file_alone(classifier_file, tmp_path):
    classifier = load_classifier(classifier_file)
    stored = torch.load(classifier_file, weights_only=True)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in classifier.state_dict().items())
    torch.save({name: tensor for name, tensor in stored.items() if not name.startswith("out.2")}, tmp_path / "w.pt")
    with pytest.raises(DataError, match="w.pt: no noisy classifier of guided-diffusion: "):
        load_classifier(tmp_path / "w.pt")
    with pytest.raises(UserError, match="no such classifier"):
        load_classifier(tmp_path / "absent.pt")


def test_the_gradient_is_that_of_the_label_and_no_label_has_none():
    """A linear classifier: grad log p = w_label - sum p w."""
    w = torch.randn(3, 4, dtype=torch.float64)

    class Known:
        def told(self, x, t):
            return x, torch.full((len(x),), float(t))

    gradient = classifier_gradient(lambda x, t: x.flatten(1) @ w.T * t[0], Known(), torch.tensor([2, -1]), 0.5)
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    p = torch.softmax(3 * x[0].flatten() @ w.T, 0)
    expected = 0.5 * 3 * (w[2] - p @ w)
    with torch.no_grad():
        given = gradient(x, 3)
    assert torch.allclose(given[0].flatten(), expected) and not given[1].any()


def test_classifier_guidance_changes_images_and_is_recorded(exp, classifier_file, config_file, tmp_path):
    for name, more in (("plain", ()), ("guided", ("--classifier", classifier_file, "--classifier_scale", "5"))):
        assert generate.main(flags(config_file, exp, "--doc", "small", "-i", tmp_path / name, "--num_samples", 2,
                                   "--no-fid", "--timesteps", "4", "--sample_type", "ddpm_noisy", "--var_type",
                                   "learned", "--classes", "3", *more)) == 0
    images = [np.array(Image.open(tmp_path / name / "000000.png")) for name in ("plain", "guided")]
    assert (images[0] != images[1]).any()
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("plain", "guided")]
    assert "classifier" not in manifests[0] and len(manifests[1]["classifier"]) == 16
    assert manifests[1]["sampler"]["classifier_scale"] == 5.0


def test_an_unconditional_network_takes_its_labels_from_the_classifier(classifier_file, config_file):
    from runners.sampling.classifier import Classifier

    config = load_config(config_file, ["model.num_classes=0", "training.label_dropout=0"])
    diffusion = Diffusion(config, "cpu")
    diffusion.classifier = Classifier(classifier_file, config.data.shape)
    settings = SamplerSettings(timesteps=3, classes="4", classifier_scale=1.0)
    sampler = diffusion.sampler(settings)
    assert sampler.labels([0, 1]).tolist() == [4, 4] and sampler([0, 1]).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(("more", "message"), [
    (["--classifier", "FILE"], "--classifier needs --classifier_scale, such as 1"),
    (["--classifier_scale", "2"], "--classifier_scale 2 needs --classifier, a file of weights"),
    (["--classifier", "FILE", "--classifier_scale", "2", "--sample_type", "heun"],
     "--classifier_scale is for generalized and ddpm_noisy, not for heun"),
    (["--classifier", "FILE", "--classifier_scale", "2", "--model.num_classes", "7"],
     "--classifier tells 10 classes apart, the network has 7"),
    (["--classifier", "FILE", "--classifier_scale", "2", "--data.image_size", "16"],
     "is for images of 1x8x8, the network for 1x16x16"),
])
def test_classifier_refusals(more, message, classifier_file, config_file, tmp_path, caplog, capsys):
    torch.save({}, tmp_path / "w.pt")
    argv = [str(classifier_file) if word == "FILE" else word for word in more]
    assert generate.main(flags(config_file, tmp_path, "--weights", tmp_path / "w.pt", "--no-fid", "--timesteps", 4,
                               *argv)) == 2
    assert message in capsys.readouterr().err + caplog.text


# Likelihoods

def nll(exp, config_file, *more):
    return diagnose.main(["nll", *flags(config_file, exp, "--doc", "small", "--num_images", 7, "--batch_size", 3,
                                        *more)])


def results(exp):
    path, = (exp / "diagnose" / "small").glob("nll-*.csv")
    return path, list(csv.DictReader(path.open())), json.loads(path.with_suffix(".json").read_text())


@pytest.fixture
def own(exp, tmp_path):
    shutil.copytree(exp / "logs", tmp_path / "logs")
    return tmp_path


def test_likelihood_is_over_all_steps_with_learned_variances(own, config_file, capsys):
    assert nll(own, config_file, "--npz") == 0
    path, rows, note = results(own)
    run = note["runs"]["small"]
    assert [row["t"] for row in rows] == [str(t) for t in range(8)] and "learned-8-steps" in path.name
    total = sum(float(row["bits"]) for row in rows) + run["prior_bits"]
    assert run["bits_per_dim"] == pytest.approx(total) and run["num_images"] == 7 and run["standard_error"] > 0
    assert f"{run['bits_per_dim']:.4f} bits/dim" in capsys.readouterr().out
    stored = np.load(path.with_name(f"{path.stem}-small") / "vb_terms.npz")["arr_0"]
    assert stored.tolist() == pytest.approx([float(row["bits"]) for row in rows[::-1]])
    assert not list(path.parent.glob("*.parts"))


def test_likelihood_does_not_depend_on_processes(own, config_file):
    assert nll(own, config_file) == 0
    _, rows, note = results(own)
    shutil.rmtree(own / "diagnose")
    argv = ["nll", *flags(config_file, own, "--doc", "small", "--num_images", 7, "--batch_size", 3)]
    assert [job.wait() for job in jobs.ranks("diagnose", argv)] == [0, 0]
    _, again, other = results(own)
    assert [float(row["bits"]) for row in again] == pytest.approx([float(row["bits"]) for row in rows], rel=1e-4)
    assert other["runs"]["small"]["bits_per_dim"] == pytest.approx(note["runs"]["small"]["bits_per_dim"], rel=1e-5)


def test_an_interrupted_likelihood_goes_on(own, config_file, monkeypatch):
    from runners.diagnosis import likelihood

    measure, done = likelihood.measure, []

    def fails_at_the_second(diagnosis, x0, places):
        done.append(places[0])
        if len(done) == 2:
            raise UserError("enough")
        return measure(diagnosis, x0, places)

    monkeypatch.setattr(likelihood, "measure", fails_at_the_second)
    assert nll(own, config_file) == 2 and done == [0, 3]
    assert nll(own, config_file) == 0 and done == [0, 3, 3, 6]
    interrupted = results(own)[1]
    shutil.rmtree(own / "diagnose")
    assert nll(own, config_file) == 0 and results(own)[1] == interrupted


def test_likelihood_of_a_published_file(exp, config_file, tmp_path):
    state = torch.load(exp / "logs" / "small" / "ckpt.pth", weights_only=True)["ema"]
    torch.save(state, tmp_path / "ADM.pt")
    assert nll(tmp_path, config_file, "--weights", tmp_path / "ADM.pt", "--timesteps", "4") == 0
    assert results(tmp_path)[2]["runs"]["small"]["format"] == "adm"


@pytest.mark.parametrize(("more", "message"), [
    (["--eps_scaler", "1.01"], "no --eps_scaler"), (["--sample_type", "generalized"], "no other --sample_type"),
    (["--data.uniform_dequantization", "true", "--model.learn_sigma", "false", "--loss.variational", "none"],
     "it needs data.rescaled, no dequantization"),
    (["--weights", "absent.pt"], "--weights absent.pt: no such file")])
def test_likelihood_refusals(more, message, exp, config_file, tmp_path, caplog, capsys):
    folder = exp if "--weights" not in more and "--data.uniform_dequantization" not in more else tmp_path
    if folder is tmp_path:
        (tmp_path / "logs" / "small").mkdir(parents=True)
        shutil.copy(exp / "logs" / "small" / "ckpt.pth", tmp_path / "logs" / "small")
    assert nll(folder, config_file, *more) == 2
    assert message in capsys.readouterr().err + caplog.text
