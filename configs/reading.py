"""YAML in, plain dictionary out: numbers as people write them, no duplicate keys, and the forms of DDIM and SA-DPM."""

import logging
import os
import re
from pathlib import Path

import yaml

from utils.errors import ConfigError

log = logging.getLogger(__name__)
CONFIG_FOLDER = Path(__file__).parent
RUN_TIME_KEYS = {"device", "tb_logger"}                 # objects that DDIM-style programs leave in a saved config
NAMESPACE_TAG = "tag:yaml.org,2002:python/object:argparse.Namespace"


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with YAML 1.2 floats (1e-4), duplicate keys refused and saved Namespaces as mappings."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(problem=f"duplicate key {key_node.value!r}",
                                                        problem_mark=key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_namespace(self, node):
        node.value = [(key, value) for key, value in node.value if key.value not in RUN_TIME_KEYS]
        return self.construct_mapping(node, deep=True)


Loader.yaml_implicit_resolvers = {                       # on, off, yes and no are words, as in YAML 1.2
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:bool"]
    for first, found in Loader.yaml_implicit_resolvers.items()}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
Loader.add_implicit_resolver("tag:yaml.org,2002:float",
                             re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
Loader.add_constructor(NAMESPACE_TAG, Loader.construct_namespace)


def parse_yaml(text: str, where: str):
    """Parse ``text`` safely.

    Raises:
        ConfigError: Not YAML, a duplicate key, or a tag that would build a Python object; names ``where`` and the line.
    """
    try:
        return yaml.load(text, Loader)  # noqa: S506  (Loader is a SafeLoader)
    except Exception as error:      # beside YAMLError, PyYAML lets through what int(), a regex or recursion raise
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{where}{line}: not usable YAML: {reason}") from None


def find_config(name: str | Path) -> Path:
    """A path as given, or a file name looked up in configs/ (the ending .yml may be left out)."""
    path = Path(name)
    is_bare = os.path.basename(name) == str(name)           # "./cifar10.yml" is a path, "cifar10.yml" a name
    candidates = [CONFIG_FOLDER / path, CONFIG_FOLDER / f"{path}.yml", path] if is_bare else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(p.name for p in CONFIG_FOLDER.glob("*.yml")))
    raise ConfigError(f"configuration {str(name)!r} not found; give a path, or one of configs/: {known}")


def read_config_file(path: Path) -> dict:
    """The file's sections as nested dictionaries, without the keys that no program of this family reads."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict) or not all(isinstance(section, dict) for section in raw.values()):
        raise ConfigError(f"{path}: must hold sections (data:, model:, ...) with keys in them")
    return drop_unread_keys(raw, path)


def drop_unread_keys(raw: dict, path: Path) -> dict:
    """Remove what the seeds' files carry and the seeds never read; say so once.

    ``validation_freq`` counts as such only beside another of these keys: in our own files it is read.
    """
    training, sampling = raw.get("training", {}), raw.get("sampling", {})
    if sampling.get("last_only", True) is not True:
        raise ConfigError(f"{path}: sampling.last_only: false is not possible; generate.py --sequence shows the chain")
    dropped = [f"{name}.{key}" for name, section, key in
               (("training", training, "n_iters"), ("sampling", sampling, "last_only"))
               if section.pop(key, None) is not None]
    if (dropped or "type" in raw.get("model", {})) and training.pop("validation_freq", None) is not None:
        dropped.append("training.validation_freq")
    if dropped:
        log.info("%s: not used, as in the programs it was written for: %s", path, ", ".join(dropped))
    return raw


def convert_ddim_form(raw: dict, path: Path) -> dict:
    """DDIM's files have ``model.type: simple``: their batch is global, they count steps, their loss is plain."""
    model = raw.get("model", {})
    if "type" not in model:
        return raw
    if model["type"] != "simple":
        raise ConfigError(f"{path}: model.type {model['type']!r} is not supported; allowed: simple")
    del model["type"]
    training = raw.setdefault("training", {})
    if "batch_size" in training:
        training.setdefault("global_batch_size", training["batch_size"])
        del training["batch_size"]
    training.setdefault("snapshot_unit", "steps")
    raw["loss"] = {"num_consecutive_steps": 0, "lamda": 0.0} | raw.get("loss", {})
    return raw
