"""train_ddp.py as a command: refusals, flags, dry runs, the commands of SA-DPM."""

import pytest
import torch

import train_ddp
from configs.schema import load_config
from tests.conftest import TINY


def run(exp, *flags):
    return train_ddp.main([*TINY, "--exp", str(exp), *flags])


@pytest.mark.parametrize(("flags", "message"), [
    (["--num_consecutive_steps", "0", "--lamda", "1"], "num_consecutive_steps 0"),
    (["--num_consecutive_steps", "1001"], "exceeds"),
    (["--loss.lamda", "0", "--num_consecutive_steps", "2"], "loss.lamda is 0, the plain loss; give --lamda as well"),
    (["--lamda", "-1"], "greater than or equal to 0"),
    (["--input_perturbation", "abc"], "abc"),
    (["--training.batch_sizes", "3"], "did you mean training.batch_size?"),
    (["--training.batch_size", "many"], "valid integer"),
    (["--training.batch_size", "0"], "greater than or equal to 1"),
    (["--training.global_batch_size", "9", "--training.micro_batch_size", "2"], "does not divide"),
    (["--training.global_batch_size", "9", "--num_process_per_node", "2"], "cannot be split over 2 processes"),
    (["--optim.lr"], "a value must follow"),
    (["--optim.grad_clip", "-1"], "greater than 0"),
    (["--data.image_size", "0"], "greater than or equal to 1"),
    (["--data.dataset", "MNIST"], "known: AFHQ"),
    (["--model.arch", "transformer"], "known: adm"),
    (["--config", "nowhere.yml"], "not found"),
    (["--doc", "../x"], "'..'"),
    (["--doc", "/x"], "relative"), (["--doc", ""], "relative"),
    (["--max_steps", "0"], "at least 1"),
    (["--seed", "4294967296"], "training.seed"),
    (["--num_proces_per_node", "2"], "did you mean --num_process_per_node?"),
    (["--amp", "fp16"], "needs a CUDA GPU"),
    (["--resume_training", "--overwrite"], "exclude each other"),
    (["--force"], "--force needs --resume_training"),
    (["--init_from", "nowhere.pth"], "nowhere.pth"),
])
def test_bad_requests_get_one_line_exit_2_and_change_nothing(tmp_path, capsys, flags, message):
    assert run(tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_cuda_where_there_is_none(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(tmp_path, "--device", "cuda") == 2
    assert "no usable CUDA GPU" in capsys.readouterr().err


def test_absent_data_are_exit_3_with_the_layout(tmp_path, capsys):
    assert train_ddp.main(["--config", "celeba.yml", "--exp", str(tmp_path), "--verbose", "critical"]) == 3
    error = capsys.readouterr().err
    assert "img_align_celeba" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_fewer_images_than_a_batch(tmp_path, capsys):
    assert run(tmp_path, "--training.batch_size", "2000") == 3
    error = capsys.readouterr().err
    assert "1797" in error and "2000" in error


def test_flags_win_over_the_file_and_the_run_remembers_them(tmp_path):
    assert run(tmp_path, "--max_steps", "1", "--lamda", "0.3", "--num_consecutive_steps", "3", "--input_pertub", "0.1",
               "--seed", "5", "--optim.lr", "1e-4") == 0
    config = load_config(tmp_path / "logs" / "digits" / "config.yml")
    assert config.loss.model_dump(exclude_defaults=True) == {"num_consecutive_steps": 3, "lamda": 0.3,
                                                             "input_perturbation": 0.1}
    assert config.training.seed == 5 and config.optim.lr == 1e-4
    # resuming needs no --config
    assert train_ddp.main(["--exp", str(tmp_path), "--doc", "digits", "--resume_training", "--max_steps", "2",
                           "--device", "cpu", "--verbose", "critical"]) == 0


@pytest.mark.parametrize("flags", [["--lamda", "0"], ["--loss.lamda", "0", "--lamda", "0.5"]])
def test_consecutive_steps_go_with_a_lamda_that_is_given(flags, tmp_path):
    train_ddp.check(train_ddp.parse([*TINY, "--exp", str(tmp_path), "--num_consecutive_steps", "2", *flags]))


def test_init_from_starts_from_the_averaged_weights(trained, tmp_path):
    source = trained / "logs" / "digits" / "ckpt.pth"
    assert run(tmp_path, "--init_from", str(source), "--max_steps", "1", "--optim.lr", "1e-30") == 0
    started = torch.load(tmp_path / "logs" / "digits" / "ckpt.pth", weights_only=True)["model"]
    for name, value in torch.load(source, weights_only=True)["ema"].items():
        assert torch.equal(started[name], value)


SA_DPM = [                                                     # config, (K, lamda): the seven published training lines
    ("celeba.yml", 2, 1), ("afhq.yml", 0, 0), ("afhq.yml", 2, 0.2), ("ffhq64.yml", 0, 0), ("ffhq64.yml", 2, 0.5),
    ("celebahq.yml", 0, 0), ("celebahq.yml", 2, 0.1)]


@pytest.mark.parametrize(("config", "K", "lamda"), SA_DPM)
def test_sa_dpms_training_commands(tmp_path, capsys, config, K, lamda):
    """As published, with --dry_run; the network cut down, since the full ones take a minute each on a CPU."""
    command = (f"--config {config} --doc sa --ni --num_consecutive_steps {K} --lamda {lamda} --num_process_per_node 1 "
               f"--dry_run --exp {tmp_path} --device cpu --model.ch 32 --model.num_res_blocks 1 --data.image_size 32")
    assert train_ddp.main(command.split()) == 0
    printed = capsys.readouterr().out
    assert f"num_consecutive_steps={K} lamda={float(lamda)}" in printed
    assert "data set" in printed.partition("absent")[2]
    assert not list(tmp_path.iterdir())


def test_a_dry_run_with_data_reads_them_and_writes_nothing(tmp_path, capsys):
    assert run(tmp_path, "--dry_run") == 0
    printed = capsys.readouterr().out
    assert "1,797" in printed and "224 in an epoch" in printed and "nothing" in printed
    assert not list(tmp_path.iterdir())


def test_help_is_complete(capsys):
    assert train_ddp.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "--num_consecutive_steps" in printed and "--master_port" in printed
