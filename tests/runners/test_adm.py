"""ADM through the scripts: training with learned variances and times by loss, sampling, guidance, likelihoods."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import generate
import train_ddp
from configs.schema import validate
from functions.losses import sequence_aware_loss
from functions.variational import Transitions, with_bound
from runners.conditioning import warn_of_numbering
from runners.diffusion import Diffusion
from runners.training.objective import Objective
from runners.training.state import TrainingState
from tests.adm import denoiser_of, network, of_kind, relative_error, schedule_of
from tests.faults import jobs
from tests.runners.adm_runs import SMALL, flags


def metrics(adm_exp) -> list[dict]:
    return [json.loads(line) for line in (adm_exp / "logs" / "small" / "metrics.jsonl").read_text().splitlines()]


def test_all_terms_of_the_loss_fall(adm_exp):
    lines = metrics(adm_exp)
    assert lines[0].keys() >= {"loss", "loss_base", "loss_sequence", "loss_bits"}
    for key in ("loss", "loss_base", "loss_sequence"):
        assert lines[-1][key] < 0.7 * lines[0][key], key
    stored = torch.load(adm_exp / "logs" / "small" / "ckpt.pth", weights_only=True)["times"]
    assert (stored["counts"] == 10).all() and (stored["losses"] > 0).all()


def test_the_history_holds_the_unweighted_losses_of_all_shards_in_their_order(adm_file, tmp_path, monkeypatch):
    seen, original = [], Objective.loss

    def loss(self, denoiser, batch):
        terms = original(self, denoiser, batch)
        seen.append((batch.t, terms.total.detach(), batch.importance))
        return terms

    monkeypatch.setattr(Objective, "loss", loss)
    assert train_ddp.main(flags(adm_file, tmp_path, "--max_steps", 6, "--training.micro_batch_size", 8)) == 0
    assert len(seen) == 6 * 4 and any((importance != 1).any() for _, _, importance in seen)
    t, losses = (torch.cat(column) for column in list(zip(*seen, strict=True))[:2])
    stored = torch.load(tmp_path / "logs" / "small" / "ckpt.pth", weights_only=True)["times"]["losses"]
    for step in range(8):
        assert torch.equal(stored[step], losses[t == step][-10:].double())
    logged = [line["loss"] for line in metrics(tmp_path)]
    weighted = [(importance * loss).mean().item() for _, loss, importance in seen]           # what is differentiated
    assert logged == pytest.approx([sum(weighted[i:i + 4]) / 4 for i in range(0, 24, 4)], rel=1e-5)


def test_held_out_losses_have_the_same_times_whatever_the_history(adm_exp, adm_file, tmp_path):
    """Of a trained network: the loss of a fresh one, which gives 0, is the same at all times."""
    held_out = "--training.validation_freq", 2, "--training.validation_num", 64, "--data.validation_fraction", 0.1
    assert train_ddp.main(flags(adm_file, tmp_path, "--max_steps", 6, "--optim.lr", 1e-12, *held_out,
                                "--init_from", adm_exp / "logs" / "small" / "ckpt.pth")) == 0
    found = [line["validation_loss"] for line in metrics(tmp_path) if "validation_loss" in line]
    assert len(found) == 3 and found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_a_linear_rate_ends_at_zero_after_the_last_step(adm_file, tmp_path):
    assert train_ddp.main(flags(adm_file, tmp_path, "--training.max_steps", 4, "--optim.lr_schedule", "linear")) == 0
    rates = [line["lr"] for line in metrics(tmp_path)]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


@pytest.mark.parametrize("sampler", [
    ("--sample_type", "ddpm_noisy", "--var_type", "learned", "--timesteps", "5", "--skip_type", "respace"),
    ("--timesteps", "ddim4", "--classes", "0-9", "--guidance", "2"),
    ("--sample_type", "ddpm_noisy", "--var_type", "learned", "--timesteps", "2,1", "--eps_scaler", "0.001,1.01")])
def test_samples(adm_exp, sampler, tmp_path, adm_file):
    assert generate.main(flags(adm_file, adm_exp, "--doc", "small", "-i", tmp_path / "x", "--num_samples", 6,
                               "--no-fid", "--batch_size", 4, *sampler)) == 0
    assert len(list((tmp_path / "x").glob("*.png"))) == 6
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
    assert manifest["model"] == {"arch": "adm"}


def test_an_npz_holds_the_labels_as_guided_diffusion_writes_them(adm_exp, adm_file, tmp_path):
    for classes, expected in (("3,7", [7, 7, 3, 7]), ("none", None)):
        folder = tmp_path / classes
        assert generate.main(flags(adm_file, adm_exp, "--timesteps", 2, "--seeds", "5,1-3", "--classes", classes,
                                   "--save", "npz", "--no-fid", "--grid", 0, "-i", folder)) == 0
        with np.load(folder / "samples_4x8x8x1.npz") as stored:
            assert stored.files == ["arr_0"] + ["arr_1"] * (expected is not None)
            if expected:
                assert stored["arr_1"].dtype == np.int64 and stored["arr_1"].tolist() == expected


def test_fixed_variances_are_said_beside_learned_ones(adm_exp, adm_file, tmp_path, capsys):
    assert generate.main(flags(adm_file, adm_exp, "--doc", "small", "-i", tmp_path / "x", "--num_samples", 1,
                               "--no-fid", "--sample_type", "ddpm_noisy", "--timesteps", 2)) == 0
    assert "this network has learned its variances, which --var_type learned uses" in capsys.readouterr().out


def test_guidance_of_a_network_that_has_not_learned_to_do_without_a_class_is_noted(adm_exp, adm_file, tmp_path, capsys):
    for dropout, told in (("0.1", False), ("0", True)):
        assert generate.main(flags(adm_file, adm_exp, "--doc", "small", "-i", tmp_path / dropout, "--num_samples", 1,
                                   "--no-fid", "--timesteps", 2, "--guidance", 2, "--training.label_dropout",
                                   dropout)) == 0
        assert ("was not trained to make (training.label_dropout 0)" in capsys.readouterr().out) == told


def test_images_that_number_their_classes_otherwise_than_published_weights_are_told_of_once(tmp_path, caplog):
    warn_of_numbering.cache_clear()
    (tmp_path / "imagenet32").mkdir()
    for i in range(1, 11):
        np.savez(tmp_path / "imagenet32" / f"train_data_batch_{i}.npz", data=np.zeros((4, 3 * 8 * 8), np.uint8),
                 labels=np.arange(1, 5))
    diffusion = Diffusion(validate({**SMALL, "data": {**SMALL["data"], "dataset": "IMAGENET32", "channels": 3},
                                    "model": {**SMALL["model"], "in_channels": 3}}, "small"), "cpu")
    torch.save(diffusion.model.state_dict(), tmp_path / "model000100.pt")
    for load, told in ((False, 0), (True, 1), (True, 1)):
        if load:
            diffusion.load(tmp_path / "model000100.pt")
        diffusion.conditions_of(diffusion.open_images(tmp_path))
        assert caplog.text.count("synsets alphabetically") == told
    diffusion.weights = replace(diffusion.weights, format="sa-ddim-ema")            # trained here, with these labels
    warn_of_numbering.cache_clear()
    diffusion.conditions_of(diffusion.open_images(tmp_path))
    assert caplog.text.count("synsets alphabetically") == 1


def test_dry_runs(adm_exp, adm_file, tmp_path, capsys):
    assert train_ddp.main(flags(adm_file, tmp_path / "e", "--dry_run")) == 0
    assert generate.main(flags(adm_file, adm_exp, "--doc", "small", "--dry_run", "--no-fid", "--timesteps", 4,
                               "--sample_type", "ddpm_noisy", "--var_type", "learned")) == 0
    assert "variational=rescaled_hybrid" in capsys.readouterr().out and not (tmp_path / "e").exists()


def test_weights_of_another_network_are_one_line(adm_exp, tmp_path, adm_file, caplog, capsys):
    """Those of a published file tell their settings; the run's own names are guided-diffusion's."""
    state = torch.load(adm_exp / "logs" / "small" / "ckpt.pth", weights_only=True)["ema"]
    torch.save(state, tmp_path / "ema_0.9999_000040.pt")
    files = ("--weights", tmp_path / "ema_0.9999_000040.pt", "-i", tmp_path / "x", "--num_samples", 2, "--no-fid",
             "--timesteps", 2)
    assert generate.main(flags(adm_file, tmp_path, *files)) == 0
    assert generate.main(flags(adm_file, tmp_path, *files, "--model.num_classes", 7)) == 3
    assert "num_classes is 10 in the file, 7 in the configuration" in capsys.readouterr().err + caplog.text


# Killed at any step, with a history

@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_run_goes_on_with_its_history_bit_for_bit(adm_file, tmp_path, world):
    def start(folder, *more, faults=None):
        argv = flags(adm_file, tmp_path / folder, "--doc", "digits", "--training.micro_batch_size", 16,
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


def test_two_processes_train_as_one(adm_file, tmp_path):
    """The same shards, so the same times, losses and history; weights to the rounding of another sum."""
    argv = ["--doc", "digits", "--training.micro_batch_size", 16, "--max_steps", 9]
    one = jobs.Job("train_ddp", flags(adm_file, tmp_path / "1", *argv))
    two = jobs.ranks("train_ddp", flags(adm_file, tmp_path / "2", *argv))
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
