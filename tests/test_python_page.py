"""docs/python.md: every block runs, in its order; and what ``Diffusion.train`` promises for a folder."""

import re

import pytest
import torch
import yaml

from configs.schema import load_config
from runners.diffusion import Diffusion
from tests.conftest import REPOSITORY
from tests.faults import jobs
from tests.tiny_net import TinyNet
from utils.errors import UserError
from utils.locks import lock_folder

SMALL = ["data.image_size=8", "model.ch_mult=[1]", "model.attn_resolutions=[]", "training.batch_size=8",
         "training.sample_num=0"]


def test_every_block_of_the_page_runs(tmp_path, monkeypatch):
    """In a folder of its own; with a feature network that needs no download."""
    text = (REPOSITORY / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 7 and text.count("```") == 14
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("models.inception.load_inception", lambda **_: TinyNet())
    names = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)  # noqa: S102
    assert names["info"].kind == "raw" and names["info"].step == 4
    assert len(list((tmp_path / "exp" / "logs").glob("mine.bak-*"))) == 1
    assert [t for t, _ in names["seen"]] == [800, 600, 400, 200, 0]
    assert names["generalized_steps"](names["denoiser"], names["x"], names["times"]).abs().max() < 1e-3
    assert names["terms"].total.max() < 1e-3
    assert names["results"]["name"] == "FID-100" and names["results"]["fid"] > 0


def test_train_prepares_and_protects_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("digits.yml", SMALL)
    assert Diffusion(config, "cpu").train("exp/logs/x", max_steps=1).step == 1
    folder = tmp_path / "exp" / "logs" / "x"
    assert load_config(folder / "config.yml") == config
    before = (folder / "ckpt.pth").read_bytes()
    with pytest.raises(UserError, match="already holds checkpoints"):
        Diffusion(config, "cpu").train("exp/logs/x", max_steps=2)
    assert (folder / "ckpt.pth").read_bytes() == before
    assert Diffusion(config, "cpu").train("exp/logs/x", resume=True, max_steps=2).step == 2
    from_run = Diffusion.from_run(folder, device="cpu")
    stored = torch.load(folder / "ckpt.pth", weights_only=True)["ema"]
    assert all(torch.equal(value, stored[name]) for name, value in from_run.model.state_dict().items())


@pytest.mark.parametrize(("settings", "message"), [
    ({"timesteps": [10, 500]}, r"timesteps \[10, 500\]: .* such as 50, 'ddim25' or '10,15,20'"),
    ({"sampler": "heun"}, "sampler is no setting of a sampler; known: sample_type, timesteps"),
    ({"eta": 3}, "eta 3: input should be less than or equal to 1"),
])
def test_settings_that_are_not_possible_are_one_line(settings, message):
    diffusion = Diffusion(load_config("digits.yml", SMALL), "cpu")
    with pytest.raises(UserError, match=message) as caught:
        next(diffusion.sample([1], **settings))
    assert "\n" not in str(caught.value) and not str(caught.value).startswith("--")


def train_one_step(folder) -> None:
    Diffusion(load_config("digits.yml", SMALL), "cpu").train(folder, max_steps=1)


def test_train_takes_a_lock(tmp_path):
    folder = tmp_path / "y"
    with lock_folder(folder):
        job = jobs.Job(train_one_step, [folder])
        assert job.wait() == 1 and "in use by another job" in job.text
    assert not folder.exists()


def test_from_run_of_a_folder_without_a_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("digits.yml", SMALL)
    Diffusion(config, "cpu").train("exp/logs/x", max_steps=1)
    file = tmp_path / "exp" / "logs" / "x" / "config.yml"
    assert yaml.safe_load(file.read_text())["training"]["batch_size"] == 8
    file.unlink()
    with pytest.raises(UserError, match="give config="):
        Diffusion.from_run("exp/logs/x", device="cpu")
    images = next(Diffusion.from_run("exp/logs/x", config=config, device="cpu").sample([1], timesteps=2)).images
    assert images.shape == (1, 1, 8, 8)


def test_a_configuration_cannot_be_changed():
    config = load_config("digits.yml")
    with pytest.raises(Exception, match="frozen"):
        config.loss.lamda = 0.5
    with pytest.raises(Exception, match="frozen"):
        config.loss = None
    changed = config.replace("loss.lamda", 0.5)
    assert changed.loss.lamda == 0.5 and config.loss.lamda == 1.0


def test_an_eps_function_of_another_shape_is_refused():
    from functions.betas import BETAS
    from functions.denoiser import Denoiser
    from functions.schedule import DiscreteSchedule

    denoiser = Denoiser(lambda x, t: x[:, :1], DiscreteSchedule(BETAS["linear"](1e-4, 0.02, 10)))
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\)"):
        denoiser(torch.randn(2, 3, 4, 4), torch.tensor([1, 2]))
