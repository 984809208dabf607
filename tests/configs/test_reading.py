"""YAML as people and the programs of this family write it."""

import logging
import os
import tracemalloc

import pytest

from configs.reading import CONFIG_FOLDER, parse_yaml
from configs.schema import Config, load_config, save_config
from utils.errors import ConfigError

SMALL = """\
data: {dataset: DIGITS, image_size: 16}
model: {ch: 32, ch_mult: [1, 2], attn_resolutions: [8]}
"""

# DDIM's cifar10.yml, key for key.
DDIM = """\
data:
    dataset: "CIFAR10"
    image_size: 32
    channels: 3
    logit_transform: false
    uniform_dequantization: false
    gaussian_dequantization: false
    random_flip: true
    rescaled: true
    num_workers: 4
model:
    type: "simple"
    in_channels: 3
    out_ch: 3
    ch: 128
    ch_mult: [1, 2, 2, 2]
    num_res_blocks: 2
    attn_resolutions: [16, ]
    dropout: 0.1
    var_type: fixedlarge
    ema_rate: 0.9999
    ema: True
    resamp_with_conv: True
diffusion:
    beta_schedule: linear
    beta_start: 0.0001
    beta_end: 0.02
    num_diffusion_timesteps: 1000
training:
    batch_size: 128
    n_epochs: 10000
    n_iters: 5000000
    snapshot_freq: 5000
    validation_freq: 2000
sampling:
    batch_size: 64
    last_only: True
optim:
    weight_decay: 0.000
    optimizer: "Adam"
    lr: 0.0002
    beta1: 0.9
    amsgrad: false
    eps: 0.00000001
    grad_clip: 1.0
"""
# SA-DPM's form: epochs, a batch per process, a checkpoint to sample from.
SA_DPM = (DDIM.replace('    type: "simple"\n', "").replace("batch_size: 128", "batch_size: 32")
          .replace("n_epochs: 10000", "n_epochs: 1200").replace("snapshot_freq: 5000", "snapshot_freq: 100")
          .replace("    last_only: True\n", "    last_only: True\n    ckpt_id: 1200\n")
          .replace("    beta1: 0.9\n", "    beta1: 0.9\n    beta2: 0.999\n"))


def load(text, tmp_path, overrides=(), name="c.yml") -> Config:
    (tmp_path / name).write_text(text)
    return load_config(tmp_path / name, overrides)


def as_namespace_dump(text: str, runtime: bool = True) -> str:
    """What ``yaml.dump`` writes for nested argparse.Namespaces, with a SummaryWriter and a torch.device among them."""
    lines = ["!!python/object:argparse.Namespace"]
    for line in text.splitlines():
        section = not line.startswith(" ")
        lines.append(f"{line} !!python/object:argparse.Namespace" if section else line.replace("    ", "  ", 1))
    if runtime:
        lines += ["device: !!python/object/apply:torch.device", "- cuda",
                  "tb_logger: &id001 !!python/object:torch.utils.tensorboard.writer.SummaryWriter",
                  "  all_writers:", "    exp/tensorboard/c: &id002 !!python/object:tensorboard.FileWriter",
                  "      event_writer: !!python/object/apply:os.system", "      - touch owned",
                  "  default_bins: [1, 2]", "  file_writer: *id002", "  me: *id001"]
    return "\n".join(lines) + "\n"


# Numbers and files

@pytest.mark.parametrize("text", ["1e-4", "0.0001", "1.0e-4", "1E-4", "+1e-4", ".1e-3", "10e-5"])
def test_one_number_however_it_is_written(text, tmp_path):
    assert load(f"{SMALL}optim: {{lr: {text}}}\n", tmp_path).optim.lr == 0.0001
    assert load(SMALL, tmp_path, [f"optim.lr={text}"]).optim.lr == 0.0001


@pytest.mark.parametrize("text", ["1e", "e4", "1e4x", "1e-4-"])
def test_what_only_looks_like_a_number_stays_text(text):
    assert parse_yaml(text, "here") == text


@pytest.mark.parametrize(("text", "message"), [
    ("", "must hold sections"),
    ("# nothing but a comment\n", "must hold sections"),
    ("just text\n", "must hold sections"),
    ("- a\n- list\n", "must hold sections"),
    ("data: 3\n", "must hold sections"),
    ("data:\n", "must hold sections"),
    ("data: {a: 1\nmodel: ]", "line 2: not usable YAML"),
    ("data:\n  image_size: 16\n  image_size: 32\n", "line 3: not usable YAML: duplicate key 'image_size'"),
    ("data: {}\ndata: {}\n", "line 2: not usable YAML: duplicate key 'data'"),
    ("data: {x: !!int ''}\n", "not usable YAML"),
    ("data: {x: !!timestamp x}\n", "not usable YAML"),
    ("data: {x: 2001-99-99}\n", "not usable YAML: month must be"),
    ("data: " + "[" * 5000 + "\n", "not usable YAML"),
    ("data: {x: \0}\n", "not usable YAML: unacceptable character"),
])
def test_files_that_are_no_configuration(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        load(text, tmp_path)
    assert str(tmp_path / "c.yml") in str(error.value)
    assert "\n" not in str(error.value)


def test_binary_file(tmp_path):
    (tmp_path / "c.yml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "c.yml")


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch owned']", "!!python/name:os.system",
                                 "!!python/object/new:os.system ['touch owned']", "!!python/object:os.PathLike {}"])
def test_no_tag_builds_an_object(tag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        load(f"{SMALL}optim:\n  lr: {tag}\n", tmp_path)
    assert not (tmp_path / "owned").exists()


# Where files are found

def test_a_file_that_is_there_wins_over_a_shipped_one_and_the_log_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    assert load_config("cifar10") == load_config("cifar10.yml")
    assert load_config("cifar10.yml").data.dataset == "CIFAR10"
    assert [r.getMessage() for r in caplog.records] == [f"reading {CONFIG_FOLDER / 'cifar10.yml'}"] * 3
    caplog.clear()
    (tmp_path / "cifar10.yml").write_text(SMALL)
    (tmp_path / "mine.yml").write_text(SMALL)
    assert load_config("cifar10.yml").data.dataset == load_config("./cifar10.yml").data.dataset == "DIGITS"
    assert load_config("cifar10").data.dataset == "CIFAR10"
    assert load_config("mine.yml").data.dataset == "DIGITS"
    assert [r.getMessage() for r in caplog.records] == [
        f"reading cifar10.yml of this folder, not {CONFIG_FOLDER / 'cifar10.yml'}",
        f"reading {CONFIG_FOLDER / 'cifar10.yml'}", "reading mine.yml"]
    caplog.clear()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yml").write_text(SMALL)
    assert load_config("run/config.yml").data.dataset == "DIGITS" and not caplog.records       # no name to look up


def bomb(levels: int, merge: bool = False) -> str:
    """Each line refers ten times to the one before."""
    first = "a0: &a0 {x: 1}\n" if merge else "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    lines = (f"a{i}: &a{i} " + ("{" + f"<<: [{', '.join([f'*a{i - 1}'] * 10)}]" + "}" if merge else
                                f"[{', '.join([f'*a{i - 1}'] * 10)}]") for i in range(1, levels))
    return first + "\n".join(lines)


@pytest.mark.parametrize(("text", "message"), [
    (bomb(9), "aliases write out to more than 50,000 values"),
    (bomb(9, merge=True), "more than 50,000 keys|a0: unknown key"),                # newer PyYAML merges each key once
    ("a: &a {x: 1}\nb: {<<: [" + ", ".join(["*a"] * 101) + "]}", "line 2: .* more than 100 mappings merged"),
    ("data: &a [*a]", "or to themselves"),
    ("data: {image_size: " + "9" * 60_000 + "}", "a number of more than 100 digits"),
    ("data: {image_size: " + "1:" * 30_000 + "1}", "a number of more than 100 digits"),
    ("# " + "x" * 200_000, "200,002 characters; a configuration has 200,000 at most")])
def test_what_would_fill_the_memory_is_refused(text, message, tmp_path):
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=message):
            load(text, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def test_a_device_or_a_pipe_is_no_configuration(tmp_path):
    os.mkfifo(tmp_path / "pipe.yml")
    for path in ("/dev/zero", tmp_path / "pipe.yml", "x" * 5000, "a\0b"):
        with pytest.raises(ConfigError, match="not found"):
            load_config(path)
    with open(tmp_path / "large.yml", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ConfigError, match="a configuration may have"):
        load_config(tmp_path / "large.yml")


def test_aliases_as_people_use_them(tmp_path):
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a", "here") == {
        "a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1}}


@pytest.mark.parametrize(("name", "hint"), [("mine.yml", ".*afhq.yml, bedroom.yml"),
                                           ("no/such/cifar10.yml", ".*afhq.yml, bedroom.yml"),
                                           ("cifar11.yml", "did you mean cifar10.yml?"),
                                           ("edm/cifar10_dppmpp.yml", "did you mean edm/cifar10_ddpmpp.yml?")])
def test_absent_file_names_the_shipped_ones(name, hint):
    with pytest.raises(ConfigError, match=rf"'{name}' not found; {hint}"):
        load_config(name)


# The forms of DDIM and SA-DPM

def test_ddim_form_is_converted_once(tmp_path):
    config = load(DDIM, tmp_path)
    assert (config.loss.num_consecutive_steps, config.loss.lamda) == (0, 0.0)
    assert config.training.global_batch_size == 128
    assert (config.training.snapshot_freq, config.training.snapshot_unit) == (5000, "steps")
    assert config.training.validation_freq == 0
    assert config.optim.beta2 == 0.999
    save_config(config, tmp_path / "effective.yml")
    assert load_config(tmp_path / "effective.yml") == config
    assert "simple" not in (tmp_path / "effective.yml").read_text()


def test_ddim_form_with_overrides(tmp_path):
    config = load(DDIM, tmp_path, ["loss.num_consecutive_steps=2", "loss.lamda=0.5", "training.batch_size=64"])
    assert (config.loss.num_consecutive_steps, config.loss.lamda) == (2, 0.5)
    assert config.training.global_batch_size == 64                  # the file's own meaning of the key


def test_sa_dpm_form(tmp_path):
    config = load(SA_DPM, tmp_path)
    assert (config.loss.num_consecutive_steps, config.loss.lamda) == (2, 1.0)       # SA-DPM's command-line defaults
    assert (config.training.batch_size, config.training.global_batch_size) == (32, None)
    assert (config.training.snapshot_freq, config.training.snapshot_unit) == (100, "epochs")
    assert (config.training.validation_freq, config.sampling.ckpt_id) == (0, 1200)


def test_keys_that_the_seeds_never_read_are_named_once(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        load(SA_DPM, tmp_path)
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == [
        "training.n_iters, sampling.last_only, training.validation_freq"]


def test_validation_freq_of_our_own_files_is_kept(tmp_path):
    assert load(SMALL + "training: {validation_freq: 500}\n", tmp_path).training.validation_freq == 500


def test_other_types_and_chain_output_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="model.type 'adm' is not supported; allowed: simple"):
        load(DDIM.replace("simple", "adm"), tmp_path)
    with pytest.raises(ConfigError, match="last_only: false is not possible"):
        load(DDIM.replace("last_only: True", "last_only: false"), tmp_path)


@pytest.mark.parametrize("text", [DDIM, SA_DPM], ids=["ddim", "sa-dpm"])
@pytest.mark.parametrize("runtime", [True, False])
def test_config_dumped_with_namespaces(text, runtime, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(as_namespace_dump(text, runtime), tmp_path, name="dump.yml") == load(text, tmp_path)
    assert not (tmp_path / "owned").exists()


def test_namespace_dump_of_pyyaml_itself(tmp_path):
    """The tags above are what PyYAML writes."""
    import argparse

    import yaml

    sections = yaml.safe_load(DDIM)
    namespace = argparse.Namespace(**{name: argparse.Namespace(**section) for name, section in sections.items()})
    assert load(yaml.dump(namespace, default_flow_style=False), tmp_path, name="dump.yml") == load(DDIM, tmp_path)


def test_runtime_objects_elsewhere_are_not_dropped_silently(tmp_path):
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        load(as_namespace_dump(DDIM) + "other: !!python/object/apply:torch.device [cpu]\n", tmp_path)


@pytest.mark.parametrize("word", ["off", "on", "yes", "no"])
def test_only_true_and_false_are_booleans(word):
    assert parse_yaml(f"cache: {word}", "here") == {"cache": word}
    assert parse_yaml("[true, False]", "here") == [True, False]
