"""EDM's pickles: everything of a published snapshot comes out, and nothing that hides in one is run."""

import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch

from models.formats.edm import is_snapshot, read_snapshot
from models.formats.edm_settings import settings_of
from models.song import SongUNet
from tests.edm_cases import SNAPSHOT, build, one
from tests.edm_writer import Persistent, dumps, network, torch_save
from utils.errors import DataError

TINY = {"model_channels": 32, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [4]}
GIVEN = {"img_resolution": 4, "img_channels": 1, "label_dim": 0, "model_type": "SongUNet", **TINY}


def tiny():
    torch.manual_seed(0)
    return SongUNet(img_resolution=4, in_channels=1, out_channels=1, **TINY)


def write(tmp_path, content, name="network-snapshot-000000.pkl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else dumps(content))
    return path


def refused(path) -> str:
    with pytest.raises(DataError) as caught:
        read_snapshot(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: not loaded as a network of EDM, nothing in it was run")
    return message


# ------------------------------------------------------------------------------------------------------- what comes out


def test_published_snapshot():
    case, snapshot = one("networks", "snapshot"), read_snapshot(SNAPSHOT)
    assert (snapshot.class_name, snapshot.init_kwargs) == (case["class_name"], case["init_kwargs"])
    assert snapshot.dataset == case["dataset_kwargs"] and not snapshot.buffers
    for part, expected in ((snapshot.loss, case["loss_fn"]), (snapshot.augment, ["AugmentPipe", case["augment_pipe"]])):
        assert [part.class_name, part.numbers] == [
            expected[0], {name: value for name, value in expected[1].items() if not name.startswith("_")}]
    assert list(snapshot.state) == [name.removeprefix("model.") for name in case["tensors"]]
    for name, (shape, total, squares) in case["tensors"].items():
        tensor = snapshot.state[name.removeprefix("model.")].double()
        assert list(tensor.shape) == shape
        sums = tensor.sum().item(), tensor.square().sum().item()
        assert sums == pytest.approx((total, squares), rel=1e-6, abs=1e-6)


def test_published_snapshot_denoises_as_published():
    case, snapshot = one("networks", "snapshot"), read_snapshot(SNAPSHOT)
    model = build(case)
    model.load_state_dict(snapshot.state)
    sigma = case["sigma"].view(-1, 1, 1, 1)
    x, s2 = case["x"], sigma**2 + 0.25
    for key, augment in (("D_x", case["augment_labels"]), ("D_x_without_augment", None)):
        with torch.no_grad():
            raw = model(x / s2.sqrt(), sigma.log().flatten() / 4, case["class_labels"], augment)
        denoised = 0.25 / s2 * x + sigma * 0.5 / s2.sqrt() * raw
        assert (denoised - case[key]).abs().max() < 1e-4 * case[key].abs().mean()


def test_tensors_shared_storages_and_the_preconditioners_own_buffers(tmp_path):
    model = tiny()
    model.map_layer1.bias = model.map_layer0.bias                            # one storage, two names
    snapshot = read_snapshot(write(tmp_path, {"ema": network(model, "iDDPMPrecond", GIVEN, {"u": torch.ones(3)})}))
    assert list(snapshot.state) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(snapshot.state[name], tensor)
    assert snapshot.buffers["u"].tolist() == [1, 1, 1]
    assert (snapshot.loss, snapshot.augment, snapshot.dataset, snapshot.optimizer) == (None,) * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_and_strides(tmp_path, dtype):
    model = tiny().to(dtype).to(memory_format=torch.channels_last)
    snapshot = read_snapshot(write(tmp_path, {"ema": network(model, "EDMPrecond", GIVEN)}))
    assert all(torch.equal(snapshot.state[name], tensor) for name, tensor in model.state_dict().items())


def test_numpy_numbers_of_old_and_new_files(tmp_path):
    loss = Persistent("EDMLoss", P_mean=np.float64(-1.5), P_std=np.float32(0.5), sigma_data=np.int64(2))
    content = dumps({"ema": network(tiny(), "EDMPrecond", GIVEN), "loss_fn": loss})
    old = content.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
    assert old != content
    for data in (content, old):
        assert read_snapshot(write(tmp_path, data)).loss.numbers == {"P_mean": -1.5, "P_std": 0.5, "sigma_data": 2}


def test_training_state(tmp_path):
    model = tiny()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 1, 4, 4), torch.ones(2)).square().sum().backward()
    optimizer.step()
    path = write(tmp_path, torch_save({"net": network(model, "EDMPrecond", GIVEN),
                                       "optimizer_state": optimizer.state_dict()}), "training-state-000000.pt")
    snapshot = read_snapshot(path)
    assert all(torch.equal(snapshot.state[name], tensor) for name, tensor in model.state_dict().items())
    assert snapshot.optimizer["param_groups"][0]["lr"] == 1e-3
    for index, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(snapshot.optimizer["state"][index][key], value) for key, value in moments.items())


def test_only_bare_pickles_look_like_snapshots(tmp_path):
    assert is_snapshot(SNAPSHOT) and not is_snapshot(tmp_path) and not is_snapshot(tmp_path / "absent.pkl")
    torch.save({}, tmp_path / "a.pkl")
    assert not is_snapshot(tmp_path / "a.pkl")


# ------------------------------------------------------------------------------------------------------------- settings


def test_settings_of_the_published_snapshot():
    settings = settings_of(read_snapshot(SNAPSHOT))
    assert settings["data"] == {"image_size": 16, "channels": 3}
    assert settings["diffusion"] == {"schedule": "sigma", "prediction": "edm"}
    model = settings["model"]
    assert (model["arch"], model["in_channels"], model["label_dim"], model["augment_dim"], model["channel_mult"]) == (
        "songunet", 3, 5, 9, [1, 1])
    assert "img_resolution" not in model and "model_type" not in model


@pytest.mark.parametrize("class_name, given, diffusion, arch", [
    ("EDMPrecond", {"sigma_data": 0.7, "sigma_max": float("inf"), "sigma_min": 0},
     {"prediction": "edm", "sigma_data": 0.7}, "dhariwal"),
    ("VPPrecond", {"beta_d": 19.1, "M": 1000}, {"prediction": "vp", "beta_d": 19.1}, "songunet"),
    ("VEPrecond", {"sigma_max": 50.0}, {"prediction": "ve", "sigma_max": 50.0}, "songunet"),
    ("iDDPMPrecond", {"C_1": 0.001}, {"prediction": "iddpm"}, "dhariwal"),
])
def test_settings_by_preconditioner(tmp_path, class_name, given, diffusion, arch):
    kwargs = {"img_resolution": 4, "img_channels": 1, "label_dropout": 0.1, **given}
    settings = settings_of(read_snapshot(write(tmp_path, {"ema": network(tiny(), class_name, kwargs)})))
    assert settings["diffusion"] == {"schedule": "sigma", **diffusion} and settings["model"]["arch"] == arch
    assert settings["training"] == {"label_dropout": 0.1}


@pytest.mark.parametrize("class_name, given, message", [
    ("Precond", {}, "a network of class Precond; known: EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond"),
    ("EDMPrecond", {"model_type": "DiT"}, "model_type is 'DiT'; known: SongUNet, DhariwalUNet"),
    ("EDMPrecond", {"num_experts": 4}, "its DhariwalUNet has the argument num_experts, which is unknown here; known"),
    ("EDMPrecond", {"embedding_type": "fourier"}, "its DhariwalUNet has the argument embedding_type"),
    ("iDDPMPrecond", {"M": 500}, "its iDDPMPrecond has M 500; only 1000 is possible"),
])
def test_what_cannot_be_rebuilt_is_a_line(tmp_path, class_name, given, message):
    kwargs = {"img_resolution": 4, "img_channels": 1, **given}
    path = write(tmp_path, {"ema": network(tiny(), class_name, kwargs)})
    with pytest.raises(DataError, match=message):
        settings_of(read_snapshot(path))


# -------------------------------------------------------------------------------------------------------------- attacks


class Payload:
    """Makes a folder if anybody unpickles it."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Bytes:
    """A storage whose nested file is of the attacker's making."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.content,)


def nested(storage_pickle: bytes, count: int, data: bytes, key="0") -> bytes:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = b"".join(pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, system))
    return head + storage_pickle + pickle.dumps([key], protocol=2) + struct.pack("<q", count) + data


class _Persistent(pickle.Pickler):
    def persistent_id(self, item):
        return item.identifier if isinstance(item, Identified) else None


class Identified:
    def __init__(self, *identifier):
        self.identifier = identifier


def storage_pickle(count, kind=torch.FloatStorage) -> bytes:
    file = io.BytesIO()
    _Persistent(file, protocol=2).dump(Identified("storage", kind, "0", "cpu", count, None))
    return file.getvalue()


def with_tensor(tensor):
    """A snapshot whose network has this in the place of a weight."""
    ema = Persistent("EDMPrecond", _parameters={"weight": tensor}, _buffers={}, _modules={}, _init_args=(),
                     _init_kwargs={})
    return {"ema": ema}


class Rebuilt:
    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (*self.arguments, False, {})


def test_a_call_outside_the_list(tmp_path):
    for content in ({"ema": Payload(tmp_path / "ran")}, with_tensor(Payload(tmp_path / "ran")),
                    {**with_tensor(torch.ones(1)), "dataset_kwargs": Payload(tmp_path / "ran")}):
        assert "it asks for posix.mkdir" in refused(write(tmp_path, content))
    assert not (tmp_path / "ran").exists()


def test_an_unpickling_hidden_in_a_storage(tmp_path):
    evil = pickle.dumps(Payload(tmp_path / "ran"), protocol=2)
    for content in (evil, nested(evil, 1, b"\0" * 4), nested(storage_pickle(1), 1, b"\0" * 4)[:-12] + evil):
        refused(write(tmp_path, with_tensor(Rebuilt(Bytes(content), 0, (1,), (1,)))))
    assert not (tmp_path / "ran").exists()


def test_a_nested_storage_of_another_name(tmp_path):
    data = nested(storage_pickle(1), 1, b"\0" * 4, key="1")
    assert "contradicts itself" in refused(write(tmp_path, with_tensor(Rebuilt(Bytes(data), 0, (1,), (1,)))))


def test_a_sound_nested_storage_is_read(tmp_path):
    data = nested(storage_pickle(3), 3, struct.pack("<3f", 1, 2, 3))
    path = write(tmp_path, with_tensor(Rebuilt(Bytes(data), 1, (2,), (1,))))
    assert read_snapshot(path).buffers["weight"].tolist() == [2, 3]


@pytest.mark.parametrize("claimed, message", [
    (25 * 2**30, "it claims a storage of 107374182400 bytes, and has 4"),
    (-1, "it claims a storage of -4 bytes"),
])
def test_a_storage_of_100_gigabytes(tmp_path, claimed, message):
    data = nested(storage_pickle(claimed), claimed, b"\0" * 4)
    assert message in refused(write(tmp_path, with_tensor(Rebuilt(Bytes(data), 0, (1,), (1,)))))


@pytest.mark.parametrize("offset, size, stride, message", [
    (0, (10**11,), (0,), "it holds a tensor of 100000000000 numbers in a storage of 4"),
    (0, (4,), (2,), "out of bounds"),
    (3, (2,), (1,), "out of bounds"),
    (-1, (1,), (1,), "impossible shape"),
    (0, (True,), (1,), "impossible shape"),
])
def test_tensors_beyond_their_storage(tmp_path, offset, size, stride, message):
    data = nested(storage_pickle(4), 4, b"\0" * 16)
    assert message in refused(write(tmp_path, with_tensor(Rebuilt(Bytes(data), offset, size, stride))))


def test_modules_without_end(tmp_path):
    module = Persistent("A", _parameters={}, _buffers={}, _modules={})
    for _ in range(20):                                        # each has the one before twice: 2^20 in all
        module = Persistent("A", _parameters={}, _buffers={}, _modules={"a": module, "b": module})
    assert "more than 10000 modules" in refused(write(tmp_path, {"ema": module}))


@pytest.mark.parametrize("content, message", [
    (b"", "empty"),
    (b"\x80\x04", "exhausted"),
    (b"not a pickle at all", "instruction|opcode"),
    (pickle.dumps([1], protocol=4), "it holds no network under 'ema'"),
    (pickle.dumps({"ema": {"a": 1}}, protocol=4), "it holds no network under 'ema'"),
])
def test_files_that_are_no_snapshot(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_snapshot(write(tmp_path, content))
    with pytest.raises(DataError, match="No such file"):
        read_snapshot(tmp_path / "absent.pkl")


def test_a_truncated_snapshot(tmp_path):
    content = SNAPSHOT.read_bytes()
    for share in (0.1, 0.5, 0.99):
        refused(write(tmp_path, content[:int(share * len(content))]))


def test_arguments_that_are_no_plain_values(tmp_path):
    for kwargs, message in (({"a": {1}}, "its argument a is a set"), ([1], "not known by name")):
        path = write(tmp_path, {"ema": network(tiny(), "EDMPrecond", kwargs)})
        assert message in refused(path)


def test_training_states_with_code_lies_or_compression(tmp_path):
    sound = torch_save({"net": network(tiny(), "EDMPrecond", GIVEN), "optimizer_state": {}})
    code = write(tmp_path, torch_save({"net": Payload(tmp_path / "ran")}), "training-state-000000.pt")
    assert "it asks for posix.mkdir" in refused(code)
    for change, message in (({"compress_type": zipfile.ZIP_DEFLATED}, "is compressed"), ({}, "it claims a storage of")):
        path = tmp_path / "training-state-000001.pt"
        with zipfile.ZipFile(io.BytesIO(sound)) as source, zipfile.ZipFile(path, "w") as target:
            for info in source.infolist():
                data = source.read(info)
                lie = info.filename.endswith("/data/0") and not change
                target.writestr(info.filename, data[:-4] if lie else data, **change)
        assert message in refused(path)
    assert not (tmp_path / "ran").exists()
