"""Shared by all tests: golden numbers where they are at hand, tiny configurations, scripts run in this process."""

import io
import lzma
import os
import shutil
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"               # no test asks the hub; read when its library is imported

REPOSITORY = Path(__file__).parent.parent
GOLDEN = REPOSITORY / "tests" / "golden"
SHARED = REPOSITORY.parent / "shared"

# digits.yml cut down to a network that trains in milliseconds; in float32, so that all machines compute the same.
TINY = ["--config", "digits.yml", "--device", "cpu", "--model.ch", "32", "--model.ch_mult", "[1]",
        "--model.num_res_blocks", "1", "--model.attn_resolutions", "[]", "--data.image_size", "8",
        "--training.batch_size", "8", "--training.sample_num", "2", "--training.sample_timesteps", "2",
        "--training.log_freq", "1", "--amp", "off", "--verbose", "critical"]


def load_kept(name: str):
    """What tests/golden keeps under a name: a compressed file of ``torch.save``."""
    content = lzma.decompress((GOLDEN / f"{name}.pt.xz").read_bytes())
    return torch.load(io.BytesIO(content), weights_only=True)


def load_golden(name: str):
    """Numbers of a published program: those of tests/golden, or else of a shared folder beside the repository.

    A state dict that would be too large for one file lies in a second one, NAME.part2.
    """
    if not (GOLDEN / f"{name}.pt.xz").exists():
        return torch.load(SHARED / "golden" / f"{name}.pt", weights_only=True)
    values = load_kept(name)
    if (GOLDEN / f"{name}.part2.pt.xz").exists():
        values["state_dict"].update(load_kept(f"{name}.part2")["state_dict"])
    return values


def golden_names(*names: str) -> list[str]:
    """Those of ``names`` that are at hand."""
    return [name for name in names
            if (GOLDEN / f"{name}.pt.xz").exists() or (SHARED / "golden" / f"{name}.pt").exists()]


@pytest.fixture(scope="session")
def golden():
    """``golden("unet_a")``: see ``load_golden``."""
    return load_golden


@pytest.fixture(scope="session")
def golden_unet(golden):
    """The network of the golden files, with its weights."""
    from configs.schema import Config
    from models import build_model

    stored = golden("unet_a")
    keys = dict(stored["config"])
    config = Config.model_validate({"data": {"dataset": "ZIP", "image_size": keys.pop("image_size")},
                                    "model": {**keys, "dropout": 0.0}})
    model = build_model(config)
    model.load_state_dict(stored["state_dict"])
    return model.eval()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """An exp/ folder with a run "digits" of two steps, to generate from."""
    import train_ddp

    exp = tmp_path_factory.mktemp("trained")
    assert train_ddp.main([*TINY, "--exp", str(exp), "--max_steps", "2"]) == 0
    return exp


@pytest.fixture
def exp(trained, tmp_path):
    """A copy of its own for the test, which is ``tmp_path``."""
    shutil.copytree(trained / "logs", tmp_path / "logs")
    return tmp_path


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch):
    """Tests run as if nobody had started them with torchrun, srun or mpirun, or had set up logging before."""
    import logging
    import os

    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)
    for name in list(os.environ):
        if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") or name.startswith(("SLURM_", "OMPI_", "PMI_")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    """Folder of a complete tiny SDXL."""
    from tests.pipelines import sdxl_pipeline

    return sdxl_pipeline(tmp_path_factory.mktemp("sdxl") / "pipeline")


@pytest.fixture
def sdxl_copy(sdxl, tmp_path):
    """One that a test may spoil."""
    import shutil

    return Path(shutil.copytree(sdxl, tmp_path / "pipeline"))


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    """Folder of a complete tiny Stable Diffusion with v_prediction."""
    from tests.pipelines import sd_pipeline

    return sd_pipeline(tmp_path_factory.mktemp("sd") / "pipeline")


@pytest.fixture(scope="session")
def captioned(tmp_path_factory):
    """Folder of sixteen captioned JPEGs."""
    from tests.pipelines import captioned_folder

    return captioned_folder(tmp_path_factory.mktemp("captioned") / "data")
