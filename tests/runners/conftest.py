import pytest
import yaml

import train_ddp
from tests.runners.adm_runs import SMALL, flags
from tests.tiny_net import TinyNet


@pytest.fixture
def net():
    return TinyNet()


@pytest.fixture(scope="session")
def adm_file(tmp_path_factory):
    """The configuration of a small ADM."""
    path = tmp_path_factory.mktemp("config") / "small.yml"
    path.write_text(yaml.safe_dump(SMALL))
    return str(path)


@pytest.fixture(scope="session")
def adm_exp(adm_file, tmp_path_factory):
    """Its run "small" of 40 steps."""
    folder = tmp_path_factory.mktemp("exp")
    assert train_ddp.main(flags(adm_file, folder, "--max_steps", 40)) == 0
    return folder
