import pytest

from tests.tiny_net import TinyNet


@pytest.fixture
def net():
    return TinyNet()
