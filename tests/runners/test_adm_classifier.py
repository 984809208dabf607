"""Guidance by a noisy classifier: what its file tells, its gradient, and what is recorded."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from configs.sampling import SamplerSettings
from configs.schema import load_config
from functions.guidance import classifier_gradient
from models.adm_classifier import ADMClassifier, load_classifier
from runners.diffusion import Diffusion
from tests.runners.adm_runs import flags
from utils.errors import DataError, UserError


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


def test_classifier_guidance_changes_images_and_is_recorded(adm_exp, classifier_file, adm_file, tmp_path):
    for name, more in (("plain", ()), ("guided", ("--classifier", classifier_file, "--classifier_scale", "5"))):
        assert generate.main(flags(adm_file, adm_exp, "--doc", "small", "-i", tmp_path / name, "--num_samples", 2,
                                   "--no-fid", "--timesteps", "4", "--sample_type", "ddpm_noisy", "--var_type",
                                   "learned", "--classes", "3", *more)) == 0
    images = [np.array(Image.open(tmp_path / name / "000000.png")) for name in ("plain", "guided")]
    assert (images[0] != images[1]).any()
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("plain", "guided")]
    assert "classifier" not in manifests[0] and len(manifests[1]["classifier"]) == 16
    assert manifests[1]["sampler"]["classifier_scale"] == 5.0


def test_an_unconditional_network_takes_its_labels_from_the_classifier(classifier_file, adm_file):
    from runners.sampling.classifier import Classifier

    config = load_config(adm_file, ["model.num_classes=0", "training.label_dropout=0"])
    diffusion = Diffusion(config, "cpu")
    diffusion.classifier = Classifier(classifier_file, config.data.shape)
    settings = SamplerSettings(timesteps=3, classes="4", classifier_scale=1.0)
    sampler = diffusion.sampler(settings)
    one = sampler.condition([0])
    assert one["labels"].tolist() == [4] and sampler.told(one) == {}, "labels are the classifier's alone"
    assert sampler.labels([0, 1]).tolist() == [4, 4] and sampler([0, 1]).shape == (2, 1, 8, 8)


def test_a_dry_run_takes_the_labels_of_a_classifier_and_counts_its_networks(classifier_file, adm_file, tmp_path,
                                                                            capsys):
    config = load_config(adm_file, ["model.num_classes=0", "training.label_dropout=0"])
    torch.save(Diffusion(config, "cpu").model.state_dict(), tmp_path / "w.pt")
    argv = flags(adm_file, tmp_path, "--weights", tmp_path / "w.pt", "--no-fid", "--num_samples", 1, "--timesteps", 4,
                 "--model.num_classes", 0, "--training.label_dropout", 0, "--classifier", classifier_file,
                 "--classifier_scale", 1, "--classes", 3)
    guided = ["--guidance", "2", "--guide_weights", str(tmp_path / "w.pt")]
    for more, calls in (([], 4), (guided, 8)):
        assert generate.main([*argv, "--dry_run", *more]) == 0
        assert f"{calls} for each of 1 images" in capsys.readouterr().out
        assert generate.main([*argv, *more, "-i", str(tmp_path / f"of{calls}")]) == 0
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    for more in ([], ["--dry_run"]):
        assert generate.main([*argv, "--guidance", "2", "--guide_weights", str(tmp_path / "bad.pt"), *more]) == 3


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
def test_classifier_refusals(more, message, classifier_file, adm_file, tmp_path, caplog, capsys):
    torch.save({}, tmp_path / "w.pt")
    argv = [str(classifier_file) if word == "FILE" else word for word in more]
    assert generate.main(flags(adm_file, tmp_path, "--weights", tmp_path / "w.pt", "--no-fid", "--timesteps", 4,
                               *argv)) == 2
    assert message in capsys.readouterr().err + caplog.text
