"""The rules of the tree: imports go down only, globals are read in few places, nothing shadows a library."""

import ast
import importlib

import pytest

from tests.conftest import REPOSITORY

# What each layer may import of the project; "configs" stands for configs.schema and what it is made of.
LAYERS = {
    "utils": set(),
    "configs": {"utils"},
    "functions": {"configs", "utils"},
    "models": {"configs", "utils"},
    "datasets": {"configs", "utils"},
    "runners": {"functions", "models", "datasets", "configs", "utils"},
}
SCRIPTS = ["train_ddp", "generate", "fid", "dataset_tool", "diagnose", "study"]
MAY_READ_PROCESS_STATE = {"runners/distributed.py", "runners/launcher.py", "runners/cli.py", "configs/from_adm.py",
                          *(f"{name}.py" for name in SCRIPTS)}
FILES = {layer: sorted((REPOSITORY / layer).rglob("*.py")) for layer in LAYERS}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_down_only(layer):
    assert FILES[layer]
    for path in FILES[layer]:
        for name in imported(ast.parse(path.read_text())):
            top = name.partition(".")[0]
            if top in LAYERS and top != layer:
                assert top in LAYERS[layer], f"{path.name} imports {name}"
            assert top not in SCRIPTS, f"{path.name} imports {name}"


@pytest.mark.parametrize("layer", LAYERS)
def test_arguments_environment_and_global_randomness_stay_outside(layer):
    for path in FILES[layer]:
        relative = str(path.relative_to(REPOSITORY))
        text = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        if relative not in MAY_READ_PROCESS_STATE:
            assert not text & {"sys.argv", "os.environ", "os.getenv"}, relative
        if relative != "functions/rng.py":
            assert not text & {"torch.manual_seed", "np.random.seed", "random.seed"}, relative


def test_pytorch_fid_is_the_installed_package():
    """A Python file in our data folder of that name would hide it."""
    assert not list((REPOSITORY / "pytorch_fid").glob("*.py"))
    assert importlib.import_module("pytorch_fid.inception").InceptionV3


def test_no_code_executing_loader_is_called():
    """torch.load and pickle only through utils/safe_load.py (and its kin in models/inception_weights.py)."""
    for paths in FILES.values():
        for path in paths:
            nodes = ast.walk(ast.parse(path.read_text()))
            calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
            if path.name != "safe_load.py":
                assert not calls & {"torch.load", "pickle.load", "pickle.loads", "eval", "exec", "torch.jit.load"}, path
