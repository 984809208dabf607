"""YAML in, plain dictionary out: numbers as people write them, no duplicate keys, and the forms of DDIM and SA-DPM."""

import difflib
import logging
import os
import re
from os.path import isfile
from pathlib import Path

import yaml

from utils.errors import ConfigError, DataError
from utils.files import read_regular

log = logging.getLogger(__name__)
CONFIG_FOLDER = Path(__file__).parent
OLD_AVERAGE = ("ema", "ema_rate", "ema_warmup")        # of model; today training.ema
SETS_ASIDE = {"training.n_epochs": "total_images", "training.batch_size": "global_batch_size"}        # of training
RUN_TIME_KEYS = {"device", "tb_logger"}                 # objects that DDIM-style programs leave in a saved config
SIZE_LIMIT = 200_000                                    # bytes of a file; configurations have 2,000
VALUE_LIMIT = 50_000                                    # values of a file once its aliases are written out
MERGE_LIMIT = 100                                       # mappings that one "<<" may merge
DIGITS = 100                                            # of a number
NAMESPACE_TAG = "tag:yaml.org,2002:python/object:argparse.Namespace"


_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}


def _too_large(what: str, node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(problem=what, problem_mark=node.start_mark)


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

    def flatten_mapping(self, node):
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge" and len(value.value) > MERGE_LIMIT:
                raise _too_large(f"more than {MERGE_LIMIT} mappings merged by one '<<'", key)
        super().flatten_mapping(node)
        if len(node.value) > VALUE_LIMIT:
            raise _too_large(f"a mapping of more than {VALUE_LIMIT:,} keys", node)

    def construct_scalar(self, node):
        if node.tag in _NUMBERS and len(node.value) > DIGITS:
            raise _too_large(f"a number of more than {DIGITS} digits", node)
        return super().construct_scalar(node)

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
        ConfigError: Not YAML, a duplicate key, a tag that would build a Python object, or larger than any
            configuration; names ``where`` and the line.
    """
    if len(text) > SIZE_LIMIT:
        raise ConfigError(f"{where}: {len(text):,} characters; a configuration has {SIZE_LIMIT:,} at most")
    try:
        content = yaml.load(text, Loader)  # noqa: S506  (Loader is a SafeLoader)
    except Exception as error:      # beside YAMLError, PyYAML lets through what int(), a regex or recursion raise
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{where}{line}: not usable YAML: {reason}") from None
    if _count_values(content, {}) > VALUE_LIMIT:
        raise ConfigError(f"{where}: not usable YAML: its aliases write out to more than {VALUE_LIMIT:,} values, or to "
                          "themselves")
    return content


def _count_values(value, known: dict[int, float]) -> float:
    """Values in a tree with its aliases written out, each counted once and added up; inf if one holds itself."""
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if id(value) not in known:
        known[id(value)] = float("inf")                  # until it is done: whoever meets it now is inside of it
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count_values(part, known) for part in parts)
    return known[id(value)]


def find_config(name: str | Path) -> Path:
    """A path as given, or else a name looked up in configs/; the ending .yml may be left out.

    A file that is there wins over a shipped one of its name; which of the two is read is said in the log.
    """
    path = Path(name)
    # "./cifar10.yml" is a path, "cifar10.yml" and "edm/ffhq64.yml" may be names.
    is_bare = not path.is_absolute() and os.path.normpath(name) == str(name) and ".." not in path.parts
    candidates = [path, CONFIG_FOLDER / path, CONFIG_FOLDER / f"{path}.yml"] if is_bare else [path]
    found = [candidate for candidate in candidates if isfile(candidate)]
    if found and is_bare and len({candidate.resolve() for candidate in found}) > 1:
        log.info("reading %s of this folder, not %s", path, found[1])
    elif found and is_bare and (found[0] != path or path.parent == Path()):     # no run's own config.yml
        log.info("reading %s", found[0])
    if found:
        return found[0]
    known = sorted(p.relative_to(CONFIG_FOLDER).as_posix() for p in CONFIG_FOLDER.rglob("*.yml")
                   if "studies" not in p.parts)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.8)
    hint = f"did you mean {close[0]}?" if close else f"give a path, or one of configs/: {', '.join(known)}"
    raise ConfigError(f"configuration {str(name)!r} not found; {hint}")


def read_config_file(path: Path) -> dict:
    """The file's sections as nested dictionaries, without the keys that no program of this family reads."""
    try:
        text = read_regular(path, 4 * SIZE_LIMIT, "configuration").decode()
    except (DataError, UnicodeDecodeError) as error:
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


def drop_other_form(raw: dict, key: str) -> None:
    """An override replaces what the file says in another form: of the averages, the batch, the length of a run."""
    if key in SETS_ASIDE:
        raw.get("training", {}).pop(SETS_ASIDE[key], None)
    elif key == "training.ema":
        for old in set(OLD_AVERAGE) & set(raw.get("model", {})):
            del raw["model"][old]
    elif key.removeprefix("model.") in OLD_AVERAGE:
        raw.get("training", {}).pop("ema", None)


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
