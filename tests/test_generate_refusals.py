"""What generate.py refuses: in one line, before anything is written."""

import shlex
import shutil

import pytest

import generate
from configs.sampling import SamplerSettings
from runners import distributed
from runners.diffusion import Diffusion
from runners.sampling.flags import numbers
from tests.test_generate import base, images, run
from utils.errors import UserError


@pytest.mark.parametrize("change", [["--eta", "0.5"], ["--timesteps", "5"], ["--no-model_ema"],
                                    ["--sample_type", "ddpm_noisy"], ["--eps_scaler", "1.01"]])
def test_a_folder_made_with_other_settings_is_refused(exp, capsys, change):
    assert run(exp, "--num_samples", "2") == 0
    before = images(exp / "image_samples" / "digits")
    assert run(exp, "--num_samples", "4", *change) == 2
    error = capsys.readouterr().err
    assert "choose another --image_folder" in error and "None" not in error
    assert ("(sampler.eta was the default, is 0.5)" in error) == (change[0] == "--eta")
    assert before.keys() == images(exp / "image_samples" / "digits").keys()


def test_a_folder_with_foreign_files_is_refused(exp, capsys):
    folder = exp / "image_samples" / "digits"
    folder.mkdir(parents=True)
    (folder / "holiday.jpg").write_bytes(b"")
    assert run(exp, "--num_samples", "2") == 2
    assert "holiday.jpg" in capsys.readouterr().err
    assert [p.name for p in folder.iterdir()] == ["holiday.jpg"]


def test_a_contradicting_config_is_refused(exp, capsys):
    assert run(exp, "--num_samples", "1", "--config", "digits.yml") == 2
    error = capsys.readouterr().err
    assert "contradicts" in error and "data.image_size" in error
    assert not (exp / "image_samples").exists()


@pytest.mark.parametrize(("flags", "message"), [
    (["--timesteps", "0"], "1 to 1000"),
    (["--timesteps", "1001"], "1 to 1000"),
    (["--eta", "1.5"], "--eta 1.5: input should be less than or equal to 1"),
    (["--seeds", "5-1"], "backwards"),
    (["--seeds", "1,1"], "twice"),
    (["--seeds", "-3"], "--seeds"),
    (["--seeds", "0-3", "--num_samples", "3"], "give one"),
    (["--sample_type", "magic"], "ddpm_noisy"),
    (["--skip_type", "spiral"], "--skip_type 'spiral' is unknown"),
    (["--time_shift", "40"], "--time_shift 40: too few numbers; such as 40,300"),
    (["--doc", "digit"], "did you mean --doc digits?"),
    (["--eps_scaler", "a"], "such as 1.017 or 0.0005,1.01"),
    (["--eps_scaler", "-1"], "greater than 0"),
    (["--ckpt_id", "77"], "no checkpoint 77"),
    (["--sampling.ckpt_id", "77"], "--sampling.ckpt_id null takes the newest"),
    (["--weights", "nowhere.pth", "--config", "digits.yml"], "nowhere.pth"),
    (["--doc", "../digits"], ".."),
    (["-i", "../out"], ".."),
    (["--fid", "--fid_stats", "nowhere.npz"], "fid.py ref"),
    (["--samples", "3"], "--num_samples"),
    (["--num_samples", "0"], "at least 1"),
    (["--save", "none", "--grid", "0"], "nothing to do"),
    (["--timesteps", "ddim10", "--skip_type", "quad"], "names the steps themselves; it goes with no --skip_type quad"),
    (["--timesteps", "5,5", "--sigma_max", "9"], "goes with no --sigma_max"),
    (["--sample_type", "diffusers:DDIMScheduler", "--timesteps", "5", "--sigma_max", "9"], "--sigma_max is of this"),
    (["--reconstruct", "nowhere", "--timesteps", "5", "--sample_type", "diffusers:DDIMScheduler"], "up and down"),
    (["--ema_length", "0"], "no power-function averages"),
    (["--ema_length", "0.1", "--no-model_ema"], "no --weights, no --no-model_ema"),
    (["--sampling.batch_sizes", "3"], "sampling.batch_size"),
    (["--weights", "nowhere.pth", "--config", "digits.yml", "--ckpt_id", "1"], "--weights names a file; give one"),
    (["--subdirs", "--save", "npz"], "--subdirs sorts PNG files, of which --save npz writes none"),
    (["--interval", "--metrics", "kid"], "--interval is FID's; add fid to --metrics"),
])
def test_bad_requests_get_one_line_and_exit_2(exp, capsys, flags, message):
    fid = "--fid" in flags
    assert run(exp, *flags, fid=fid) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (exp / "image_samples").exists()


def test_ranks_that_have_read_different_weights_are_refused(exp, capsys, monkeypatch):
    """A training run has replaced the file in between."""
    gather = distributed.gather_objects
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, "other"] if isinstance(value, str)
                        else gather(value))
    assert run(exp, "--num_samples", "1", "--timesteps", "2") == 2
    assert "was replaced while the ranks read it; run the command again" in capsys.readouterr().err


def test_a_guide_of_another_chain_is_refused(exp, capsys):
    other = exp / "logs" / "other"
    shutil.copytree(exp / "logs" / "digits", other)
    config = (other / "config.yml").read_text()
    (other / "config.yml").write_text(config.replace("beta_end: 0.012", "beta_end: 0.02"))
    flags = ["--num_samples", "1", "--timesteps", "2", "--guidance", "2", "--guide_weights"]
    assert run(exp, *flags, str(other / "ckpt.pth")) == 2
    assert "another kind of network, it differs in the chain" in capsys.readouterr().err
    assert run(exp, *flags, str(exp / "logs" / "digits" / "ckpt.pth")) == 0


def test_without_any_run_the_message_says_what_to_do(tmp_path, capsys):
    assert run(tmp_path, "--config", "digits.yml") == 2
    assert "train first" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_for_a_missing_reference_describes_the_same_images(exp, capsys):
    import fid

    assert generate.main([*base(exp), "--data.root", str(exp / "my data"), "--fid_stats", "none.npz"]) == 2
    words = shlex.split(capsys.readouterr().err.partition("make it with: python fid.py ")[2])
    args = fid.parse(words)
    fid.check(args)
    assert args.exp == str(exp) and args.overrides == [f"data.root={exp / 'my data'}"]
    assert args.config == str(exp / "logs" / "digits" / "config.yml") and args.out == "pytorch_fid/none.npz"


def test_seeds_from_python_are_checked(exp):
    diffusion = Diffusion.from_run(exp / "logs" / "digits", device="cpu")
    for seeds, message in (([-1], "seed -1"), ([5, 5], "5 is given twice"), (range(10**11), "0 to 4294967295")):
        with pytest.raises(UserError, match=message):
            next(diffusion.sample(seeds, timesteps=2))
    assert next(diffusion.sample(range(2**32), timesteps=1, batch_size=2)).seeds == [0, 1]        # none is listed
    with pytest.raises(UserError, match="as keywords, not both"):
        next(diffusion.sample([0], SamplerSettings(timesteps=2), eta=1.0))


def test_scaler_forms():
    assert numbers("eps_scaler", "1.017") == 1.017 and numbers("eps_scaler", "0.001,1.01") == (0.001, 1.01)
    assert numbers("churn", "40") == (40.0,)
    with pytest.raises(UserError, match="such as 1.017"):
        numbers("eps_scaler", "one")


@pytest.mark.parametrize(("flags", "message"), [
    (["--restart", "3,2,0.3,1e9"], "--restart 3,2,0.3,1e+09: MAX must lie above"),
    (["--dcw", "x"], "such as 0.05"), (["--gamma", "absent.json", "--var_type", "analytic"], "diagnose.py gamma"),
    (["--time_shift", "40"], "such as 40,300"), (["--restart", "3,2,0.3,2", "--reconstruct", "."], "draws no noise"),
])
def test_remedies_that_are_not_possible_are_refused_in_one_line(exp, capsys, flags, message):
    assert run(exp, "--num_samples", "1", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
