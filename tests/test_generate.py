"""generate.py: images depend on seeds alone, runs resume, pictures, FID and its log."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from configs.sampling import SAMPLE_TYPES, SamplerSettings
from configs.schema import Config
from functions.denoiser import Denoiser
from functions.ode import heun_steps
from functions.rng import parse_seeds
from functions.schedule import FlowSchedule
from runners import distributed
from runners.conditioning import PROMPT_STRIDE, numbered
from runners.diffusion import Diffusion
from runners.evaluation import references
from runners.evaluation.statistics_files import read_statistics
from runners.sampling.steps import form_of
from tests.conftest import TINY
from tests.faults import jobs

SAMPLERS = [("generalized", "0"), ("generalized", "0.5"), ("generalized", "1"), ("ddpm_noisy", "0")]


def base(exp):
    return ["--exp", str(exp), "--doc", "digits", "--device", "cpu", "--timesteps", "4", "--verbose", "critical"]


def run(exp, *flags, fid=False):
    return generate.main([*base(exp), *flags, *([] if fid else ["--no-fid"])])


def images(folder):
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in sorted(folder.glob("*.png"))}


@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_an_image_depends_on_its_seed_only(exp, sampler, eta):
    flags = ["--sample_type", sampler, "--eta", eta, "--seeds", "0-63"]
    for batch in (1, 7, 64):
        assert run(exp, *flags, "-i", f"b{batch}", "--batch_size", str(batch)) == 0
    reference = images(exp / "image_samples" / "b64")
    assert len(reference) == 64 and not np.array_equal(reference["000000.png"], reference["000001.png"])
    for batch in (1, 7):
        other = images(exp / "image_samples" / f"b{batch}")
        assert other.keys() == reference.keys()
        assert max(abs(other[name] - reference[name]).max() for name in other) <= 1


def test_two_processes_make_the_same_images_and_the_same_fid(exp, capsys):
    import fid

    reference = exp / "reference.npz"
    assert run(exp, "--seeds", "100-107", "-i", "reference") == 0
    assert fid.main(["ref", "--images", str(exp / "image_samples" / "reference"), "--out", str(reference),
                     "--device", "cpu"]) == 0
    common = ["--num_samples", "6", "--eta", "1", "--batch_size", "2", "--fid_stats", str(reference)]
    assert run(exp, *common, "-i", "one", "--fid_log", str(exp / "one.txt"), fid=True) == 0
    ranks = jobs.ranks("generate", [*base(exp), *common, "-i", "two", "--fid_log", str(exp / "two.txt")])
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.text for rank in ranks]
    one, two = images(exp / "image_samples" / "one"), images(exp / "image_samples" / "two")
    assert one.keys() == two.keys() and len(one) == 6
    assert max(abs(one[name] - two[name]).max() for name in one) <= 1
    logs = [json.loads((exp / f"{name}.jsonl").read_text()) for name in ("one", "two")]
    assert logs[0]["fid"] == pytest.approx(logs[1]["fid"], rel=1e-5)
    assert (exp / "one.txt").read_text() == f"Checkpoint digits/ckpt.pth  --> FID {logs[0]['fid']}\n"
    entry = logs[0]
    assert entry["name"] == "FID-6" and entry["num_images"] == 6 and entry["world_size"] == 1
    assert entry["weights_kind"] == "ema" and entry["step"] == 2 and entry["sampler"]["eta"] == 1.0
    # the line is enough to repeat the number, here without files
    again = ["--seeds", entry["seeds"], "--eta", str(entry["sampler"]["eta"]), "--batch_size", str(entry["batch_size"]),
             "--fid_stats", str(reference), "--save", "none", "--fid_log", str(exp / "again.txt")]
    assert run(exp, *again, fid=True) == 0
    assert json.loads((exp / "again.jsonl").read_text())["fid"] == entry["fid"]


def test_a_reference_is_read_once(exp, monkeypatch):
    read, mean = [], np.zeros(2048)
    np.savez(exp / "unknown.npz", mu=mean, sigma=np.eye(2048))
    monkeypatch.setattr(references, "read_statistics", lambda *args: read.append(args) or read_statistics(*args))
    assert run(exp, "--num_samples", "4", "--save", "none", "--fid_stats", str(exp / "unknown.npz"), fid=True) == 0
    assert len(read) == 1


def test_the_python_api_makes_the_same_images(exp):
    assert run(exp, "--seeds", "3-8", "--batch_size", "6", "--eta", "0.5") == 0
    files = images(exp / "image_samples" / "digits")
    diffusion = Diffusion.from_run(exp / "logs" / "digits", device="cpu")
    batch, = diffusion.sample(range(3, 9), timesteps=4, eta=0.5)
    assert batch.seeds == [3, 4, 5, 6, 7, 8] and batch.images.shape == (6, 1, 8, 8)
    assert 0 <= batch.images.min() and batch.images.max() <= 1
    made = (batch.images * 255).round().int().numpy()
    for seed, image in zip(batch.seeds, made, strict=True):
        assert np.array_equal(files[f"{seed:06d}.png"], image[0])


def test_missing_images_are_made_again_and_the_others_kept(exp):
    assert run(exp, "--num_samples", "6", "--batch_size", "3") == 0
    folder = exp / "image_samples" / "digits"
    before = images(folder)
    kept = (folder / "000000.png").stat().st_mtime_ns
    (folder / "000004.png").unlink()
    assert run(exp, "--num_samples", "6", "--batch_size", "3") == 0
    after = images(folder)
    assert all(np.array_equal(before[name], after[name]) for name in before) and len(after) == 6
    assert (folder / "000000.png").stat().st_mtime_ns == kept


def test_npz_holds_the_images_in_seed_order_and_resumes(exp):
    assert run(exp, "--seeds", "5,1-3", "--save", "png") == 0
    assert run(exp, "--seeds", "5,1-3", "--save", "npz", "-i", "packed", "--batch_size", "3") == 0
    array = np.load(exp / "image_samples" / "packed" / "samples_4x8x8x1.npz")["arr_0"]
    files = images(exp / "image_samples" / "digits")
    for row, seed in zip(array, [5, 1, 2, 3], strict=True):
        assert abs(row[..., 0].astype(int) - files[f"{seed:06d}.png"]).max() <= 1
    assert run(exp, "--seeds", "5,1-3", "--save", "npz", "-i", "packed", "--batch_size", "3") == 0


def test_subdirs_and_absolute_folders(exp):
    assert run(exp, "--seeds", "999-1000", "--subdirs", "-i", str(exp / "elsewhere")) == 0
    assert (exp / "elsewhere" / "000000" / "000999.png").exists()
    assert (exp / "elsewhere" / "001000" / "001000.png").exists()


def sheet(columns, rows, side=8):
    """Width and height of a picture whose images are enlarged until it is 640 pixels wide."""
    factor = -(-(642 - 2 * columns) // (columns * side))
    return columns * (side * factor + 2) - 2, rows * (side * factor + 2) - 2


def test_pictures(exp):
    assert run(exp, "--num_samples", "3", "--interpolation", "--sequence", "--grid", "2") == 0
    assert run(exp, "--num_samples", "3", "--grid", "2") == 0
    sizes = {p.name: Image.open(p).size for p in (exp / "image_samples").glob("*.png")}
    assert sizes == {"digits_interpolation.png": sheet(11, 2), "digits_grid.png": sheet(2, 1),
                     "digits_sequence.png": sheet(5, 3)}


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_ends_of_an_interpolation_are_the_seeds_images(exp, eta):
    """With eta 1 a row has the later draws of its first seed."""
    from runners.sampling.pictures import interpolation_grid

    diffusion = Diffusion.from_run(exp / "logs" / "digits", device="cpu")
    settings = SamplerSettings(timesteps=4, eta=eta)
    grid = interpolation_grid(diffusion.sampler(settings), [4, 9], columns=3)
    batch, = diffusion.sample([4, 9], settings)
    factor = -(-(642 - 6) // 24)
    ends = torch.stack([grid[:, ::factor, :8 * factor:factor], grid[:, ::factor, -8 * factor::factor]]).int()
    exact = 2 if eta == 0 else 1
    assert (ends - (batch.images * 255).round().int())[:exact].abs().max() <= 1


def test_weights_from_a_file_use_the_given_config(exp):
    weights = exp / "logs" / "digits" / "ckpt.pth"
    tiny = [flag for flag in TINY if flag not in ("--verbose", "critical")]
    assert run(exp, *tiny, "--weights", str(weights), "--doc", "other", "--num_samples", "1") == 0


def test_a_chain_shorter_than_the_default_is_run_whole(exp):
    config = exp / "logs" / "digits" / "config.yml"
    config.write_text(config.read_text().replace("num_diffusion_timesteps: 1000", "num_diffusion_timesteps: 20"))
    assert generate.main(["--exp", str(exp), "--doc", "digits", "--device", "cpu", "--verbose", "critical", "--no-fid",
                          "--num_samples", "1"]) == 0
    manifest = json.loads((exp / "image_samples" / "digits" / "manifest.json").read_text())
    assert manifest["sampler"]["timesteps"] == 20


def test_a_flow_takes_its_form_from_the_levels_that_are_finite():
    times, schedule = [0.01, 0.3, 0.6, 1.0], FlowSchedule()
    settings = SamplerSettings(sample_type="heun", timesteps=4, ode_time="vp")
    form = form_of(settings, schedule, None, times)
    made = heun_steps(Denoiser(lambda x, t: x, schedule, "flow"), torch.ones(1, 1, 2, 2), times, form=form)
    assert made.isfinite().all()


@pytest.mark.parametrize("sample_type", SAMPLE_TYPES)
@pytest.mark.parametrize("diffusion", [{"schedule": "flow", "prediction": "flow"}, {
    "prediction": "v_prediction", "zero_terminal_snr": True, "skip_type": "trailing"}], ids=["flow", "v"])
def test_one_step_from_noise_alone_is_the_estimate_of_the_image(diffusion, sample_type):
    config = Config(data={"dataset": "DIGITS", "image_size": 8, "channels": 1}, diffusion=diffusion,
                    model={"in_channels": 1, "out_ch": 1, "ch": 32, "ch_mult": [1], "num_res_blocks": 1,
                           "attn_resolutions": []})
    runner, seen = Diffusion(config, "cpu"), []
    forms = [{}, {"ode_time": "vp"}] if sample_type in ("heun", "euler") else [{}]
    for form in forms:
        settings = SamplerSettings(sample_type=sample_type, timesteps=1, **form)
        batch, = runner.sample([0, 1], settings, callback=lambda index, t, x, x0, eps: seen.append(x0))
        torch.testing.assert_close(batch.images, runner.codec.decode(seen[-1]))
        assert runner.sampler(settings).calls == 1
    assert len(seen) == len(forms)


def test_pictures_alone_are_something_to_do(exp):
    assert run(exp, "--num_samples", "2", "--timesteps", "2", "--interpolation", "--save", "none", "--grid", "0") == 0


def test_billions_of_seeds_are_not_listed():
    assert next(distributed.deal(range(2**32), 64)) == (0, list(range(64)))
    numbers = numbered(2, parse_seeds("5-4294967295,0"))
    assert len(numbers) == 2 * (2**32 - 4) and numbers[0] == 5 and numbers[-1] == PROMPT_STRIDE
    assert list(numbered(2, range(2))) == [0, 1, PROMPT_STRIDE, PROMPT_STRIDE + 1]


def test_dealing_is_complete_and_disjoint(monkeypatch):
    seeds, parts = list(range(100, 123)), []
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(distributed.deal(seeds, 5))
    dealt = sorted(batch for part in parts for batch in part)
    assert [seed for _, batch in dealt for seed in batch] == seeds
    assert [start for start, _ in dealt] == [0, 5, 10, 15, 20]


@pytest.mark.parametrize("flags", [
    ["--dcw", "0.05,0.01", "--time_shift", "200,100"], ["--dcw", "0.1,pixel", "--restart", "3,2,0.3,2"],
    ["--time_shift", "200,100,code,0.2", "--sample_type", "ddpm_noisy"]], ids=["dcw", "restart", "code"])
def test_remedies_of_a_seed_do_not_depend_on_its_batch_and_reach_manifest_and_dry_run(exp, flags, capsys):
    for batch in ("1", "4"):
        assert run(exp, *flags, "--seeds", "0-3", "-i", f"b{batch}", "--batch_size", batch) == 0
    assert run(exp, "--seeds", "0-3", "-i", "plain", *flags[-2:] * (flags[-1] == "ddpm_noisy")) == 0
    one, four, plain = (images(exp / "image_samples" / name) for name in ("b1", "b4", "plain"))
    assert max(abs(one[name] - four[name]).max() for name in one) <= 1
    assert any(not np.array_equal(one[name], plain[name]) for name in one)
    manifest = json.loads((exp / "image_samples" / "b1" / "manifest.json").read_text())
    assert manifest["sampler"].keys() >= {flag[2:] for flag in flags if flag.startswith("--")}
    assert run(exp, *flags, "--dry_run") == 0
    assert f"{8 if '--restart' in flags else 4} for each" in capsys.readouterr().out          # 2 repeats of 2 steps
