"""generate.py --reconstruct: pairs of images and what inversion and chain make of them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from configs.sampling import SamplerSettings
from runners.diffusion import Diffusion
from runners.sampling.pictures import open_originals, reconstruct
from utils.png import tile


@pytest.fixture
def originals(tmp_path):
    folder, rng = tmp_path / "originals", np.random.default_rng(0)
    folder.mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (10, 8), np.uint8)).save(folder / f"{i}.png")
    return folder


def run(exp, *flags):
    return generate.main(["--exp", str(exp), "--doc", "digits", "--device", "cpu", "--timesteps", "3", *flags,
                          "-i", str(exp / "out"), "--verbose", "critical"])


@pytest.mark.parametrize(("count", "columns", "shape"), [
    (4, 2, (642, 642)), (20, 2, (10 * 130 - 2, 2 * 130 - 2)), (3, 1, (3 * 418 - 2, 418 - 2)),
    (200, 1, (200 * 18 - 2, 16))])
def test_a_tall_sheet_is_enlarged_no_further_than_fits_a_screen(count, columns, shape):
    assert tile(torch.zeros(count, 1, 16, 16, dtype=torch.uint8), columns).shape == (1, *shape)


@pytest.mark.parametrize("sampler", ["generalized", "heun"])
def test_pairs_and_errors(exp, originals, capsys, sampler):
    assert run(exp, "--reconstruct", str(originals), "--seeds", "0,2-5", "--batch_size", "2", "--sample_type",
               sampler) == 0
    line = json.loads((exp / "out_reconstruction.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == line
    assert line["indices"] == [0, 2, 3, 4, 5] and line["network_calls"] == {"generalized": 6, "heun": 8}[sampler]
    assert line["mse"] == pytest.approx(np.mean(line["mse_of_each"])) and len(line["mse_of_each"]) == 5
    picture = np.asarray(Image.open(exp / "out_reconstruction.png"))
    side = 20 * 8                                                          # enlarged until the sheet is 640 pixels wide
    assert picture.shape == (2 * (side + 2) - 2, 4 * (side + 2) - 2)       # two full rows of two pairs
    first = np.asarray(Image.open(originals / "0.png"))[1:9]               # the middle square
    assert np.array_equal(picture[:side:20, :side:20], first)


def test_a_network_that_knows_the_way_reconstructs_exactly(trained, originals, tmp_path):
    """With an eps that does not depend on x the reversed chain is exact."""
    diffusion = Diffusion.from_run(trained / "logs" / "digits", device="cpu")
    diffusion.network = lambda: lambda x, t: torch.full_like(x, 0.7)
    sampler = diffusion.sampler(SamplerSettings(timesteps=5, eps_scaler=1.01))
    reconstruct(sampler, "originals", open_originals(str(originals), diffusion.config), [0, 1, 2], 2,
                tmp_path / "exact")
    assert json.loads((tmp_path / "exact_reconstruction.json").read_text())["largest_error"] < 1e-4


@pytest.mark.parametrize(("flags", "message"), [
    (["--num_samples", "7"], "has 6 images"), (["--eta", "0.5"], "draws no noise"),
    (["--sample_type", "ddpm_noisy"], "draws no noise"), (["--sample_type", "heun", "--churn", "3"], "draws no noise")])
def test_refusals(exp, originals, capsys, flags, message):
    assert run(exp, "--reconstruct", str(originals), *flags) == 2
    assert message in capsys.readouterr().err and not list(exp.glob("out*"))


@pytest.mark.parametrize(("flags", "message"), [
    (["--churn", "3"], "for heun and euler"), (["--sample_type", "heun", "--churn", "a"], "--churn 'a' is not a list"),
    (["--sample_type", "euler", "--churn", "1,5,2"], "s_min at most s_max")])
def test_refused_churn(exp, capsys, flags, message):
    assert run(exp, *flags, "--no-fid", "--num_samples", "1") == 2
    assert message in capsys.readouterr().err
