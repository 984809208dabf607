"""ADM's and EDM's networks as a state dict with a JSON of arguments, by the names of the programs they come from."""

import json

import pytest
import torch
import yaml

import generate
import train_ddp
from configs.schema import validate
from models import build_model, load_weights, stored_settings
from models.formats.edm_settings import settings_from
from models.formats.plain import settings_beside
from runners.export_plain import arguments_of, write_plain
from tests import adm, edm_cases
from tests.runners.adm_runs import SMALL as SMALL_ADM
from tests.test_edm import SMALL as SMALL_EDM


def config_of(settings: dict):
    return validate({**settings, "data": {"dataset": "ZIP", **settings["data"]}}, "here")


@pytest.mark.parametrize("case", edm_cases.cases("networks", "network", needs="state_dict"))
def test_edm_gets_its_own_names_and_arguments_back(case, tmp_path):
    config = config_of(settings_from(tmp_path, case["class_name"], case["init_kwargs"]))
    model = build_model(config)
    model.load_state_dict(edm_cases.build(case).state_dict())
    write_plain(config, model.state_dict(), tmp_path)
    written = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert list(written) == list(case["state_dict"])                         # iDDPM's table among them
    for name, tensor in case["state_dict"].items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-5 if name == "u" else 0, atol=0)    # u is computed
    told = json.loads((tmp_path / "weights.json").read_text())
    assert told["class_name"] == case["class_name"]
    assert told["init_kwargs"].items() >= case["init_kwargs"].items()
    again = config_of(stored_settings(tmp_path / "weights.pt"))
    assert again.model == config.model and again.diffusion == config.diffusion
    assert load_weights(build_model(again), tmp_path / "weights.pt").format == "edm-state"


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in adm.cases("adm_unet")
                                  if "state_dict" in case and "unet" in case])
def test_guided_diffusion_gets_its_own_names_and_arguments_back(case, tmp_path):
    torch.save({name: tensor.clone() for name, tensor in case["state_dict"].items()}, tmp_path / "a.pt")
    (tmp_path / "a.json").write_text(json.dumps({"class_name": "UNetModel", "init_kwargs": case["unet"]}))
    config = config_of(stored_settings(tmp_path / "a.pt"))
    model = build_model(config)
    assert load_weights(model, tmp_path / "a.pt").format == "adm"
    write_plain(config, model.state_dict(), tmp_path)
    written = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert written.keys() == case["state_dict"].keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in case["state_dict"].items())
    assert json.loads((tmp_path / "weights.json").read_text())["init_kwargs"] == case["unet"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{family: a folder "exp" with a trained run "digits"}."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "adm.yml").write_text(yaml.safe_dump(SMALL_ADM))
    common = ["--device", "cpu", "--verbose", "critical", "--doc", "digits", "--max_steps", "2"]
    assert train_ddp.main(["--config", str(folder / "adm.yml"), "--exp", str(folder / "adm"), *common,
                           "--diffusion.timestep_respacing", "4"]) == 0
    assert train_ddp.main([*SMALL_EDM, "--exp", str(folder / "edm"), "--max_steps", "2"]) == 0
    return {family: folder / family for family in ("adm", "edm")}


@pytest.mark.parametrize("family", ["adm", "edm"])
def test_an_export_is_sampled_without_a_configuration_as_its_run_is(family, runs, tmp_path):
    exported = tmp_path / "exported"
    common = ["--device", "cpu", "--verbose", "critical", "--exp", str(runs[family])]
    assert generate.main([*common, "--doc", "digits", "--export", str(exported)]) == 0
    assert sorted(path.name for path in exported.iterdir()) == ["README.md", "weights.json", "weights.pt"]
    card = (exported / "README.md").read_text()
    assert "library_name: pytorch" in card and "load_state_dict" in card and "class-conditional" in card
    sampling = [*common, "--timesteps", "2", "--seeds", "0-3", "--no-fid", "--classes", "0-3"]
    assert generate.main([*sampling, "--doc", "digits", "-i", str(tmp_path / "run")]) == 0
    assert generate.main([*sampling, "--weights", str(exported / "weights.pt"), "-i", str(tmp_path / "export")]) == 0
    for i in range(4):
        name = f"00000{i}.png"
        assert (tmp_path / "export" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


@pytest.mark.parametrize(("family", "change", "message"), [
    ("adm", ["--diffusion.prediction", "v_prediction"], "does not compute diffusion.prediction v_prediction"),
    ("adm", ["--diffusion.beta_schedule", "quad"], "other betas than its linear and cosine ones"),
    ("edm", ["--diffusion.prediction", "epsilon", "--diffusion.schedule", "discrete"], "no preconditioner for"),
    ("edm", ["--data.image_size", "[8,16]"], "know square images only")])
def test_what_the_other_program_does_not_compute_is_one_line(family, change, message, runs, tmp_path, capsys):
    run = runs[family] / "logs" / "digits"
    argv = ["--config", str(run / "config.yml"), "--weights", str(run / "ckpt.pth"), "--exp", str(tmp_path), "--device",
            "cpu", "--verbose", "critical", "--export", str(tmp_path / "exported"), *change]
    assert generate.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "exported").exists()


@pytest.mark.parametrize(("content", "message"), [
    ("{", "broken or no JSON"), ('{"class_name": 3, "init_kwargs": {}}', "class_name must be a text"),
    ('{"class_name": "UNetModel", "init_kwargs": {"image_size": "8"}}', "must be whole numbers"),
    ('{"class_name": "UNetModel", "init_kwargs": {"depth": 8}}', "has the argument depth, which is unknown here"),
    ('{"class_name": "Net", "init_kwargs": {}}', "a network of class Net; known: EDMPrecond"),
    ('{"class_name": "EDMPrecond", "init_kwargs": {"model_type": []}}', "model_type is []; known"),
    ('{"loss": 3}', "no configuration")])
def test_odd_arguments_beside_weights_are_one_line(content, message, tmp_path, capsys):
    torch.save({"model.a": torch.ones(1)}, tmp_path / "a.pt")
    (tmp_path / "a.json").write_text(content)
    assert generate.main(["--weights", str(tmp_path / "a.pt"), "--exp", str(tmp_path), "--device", "cpu", "--no-fid",
                          "--verbose", "critical", "--timesteps", "2", "--num_samples", "1"]) in (2, 3)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_arguments_leave_out_is_as_in_unetmodel(tmp_path):
    """One head, which is in no tensor."""
    (tmp_path / "a.json").write_text(json.dumps({"class_name": "UNetModel", "init_kwargs": {
        "image_size": 32, "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1,
        "attention_resolutions": [2]}}))
    model = config_of(settings_beside(tmp_path / "a.pt")).model
    assert (model.num_heads, model.use_scale_shift_norm, model.channel_mult) == (1, False, (1, 2, 4, 8))


def test_ddpms_linear_betas_are_guided_diffusions():
    sections = {"data": {"dataset": "ZIP", "image_size": 32, "channels": 3}, "model": {"arch": "adm"}}
    assert arguments_of(validate(sections, "here"))["diffusion"]["noise_schedule"] == "linear"
