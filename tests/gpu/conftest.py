"""Checks for a GPU. ``pytest tests/gpu --on cpu`` runs on a CPU those that make sense there."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--on", default="cuda", choices=["cuda", "cpu"], help="device of the tests in tests/gpu")


def pytest_collection_modifyitems(config, items):
    on = config.getoption("--on", "cuda")
    for item in items:
        if not item.get_closest_marker("cuda"):
            continue
        if on == "cuda" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
        elif on == "cpu" and item.get_closest_marker("cuda").kwargs.get("only"):
            item.add_marker(pytest.mark.skip(reason="only a GPU can"))


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--on", "cuda"))
