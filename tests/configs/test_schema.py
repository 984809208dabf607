"""What the configuration accepts, and how it refuses the rest."""

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.schema import Config, documentation, dotted_keys, load_config, save_config, validate
from utils.errors import ConfigError, UserError


def raw(**changes) -> dict:
    """A small valid configuration; ``data__image_size=8`` sets data.image_size."""
    sections = {"data": {"dataset": "DIGITS", "image_size": 16}, "model": {"ch": 32, "ch_mult": [1, 2]}}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = value
    return sections


def refusal(**changes) -> str:
    with pytest.raises(ConfigError) as error:
        validate(raw(**changes), "c.yml")
    assert error.value.code == 2
    message = str(error.value)
    assert message.startswith("c.yml: ") and "\n" not in message
    return message.removeprefix("c.yml: ")


def test_two_sections_are_enough():
    config = Config(**raw())
    assert (config.loss.num_consecutive_steps, config.loss.lamda) == (2, 1.0)
    assert (config.optim.lr, config.optim.lr_schedule, config.optim.grad_clip) == (2e-4, "constant", None)
    assert config.data.shape == (3, 16, 16)


def test_every_key_is_documented():
    assert [key for key, (_, _, description) in dotted_keys().items() if not description] == []


def test_frozen():
    with pytest.raises(ValidationError):
        Config(**raw()).optim.lr = 1.0


def test_non_square_round_trip(tmp_path):
    config = Config(**raw(data__image_size=[16, 8]))
    assert (config.data.height, config.data.width) == (16, 8)
    save_config(config, tmp_path / "c.yml")
    assert load_config(tmp_path / "c.yml") == config


@pytest.mark.parametrize(("changes", "message"), [
    # averages that a full state could not tell apart, or whose files have one name
    (dict(training__ema=[0.9, 0.99, {"rate": 0.99, "warmup": True}]),
     "training: ema has two averages of rate 0.99; leave one of them out"),
    (dict(training__ema=[{"length": 0.05}, {"length": 0.0502}]),
     "training: ema has two averages of length 0.050; leave one of them out"),
    (dict(training__ema=True), "training.ema: true and false are no averages, given [True]; give rates such as 0.9999, "
                               "or false alone for none"),
    # unknown keys
    (dict(training__batchsize=3), "training.batchsize: unknown key; did you mean training.batch_size?"),
    (dict(optim__dropout=0.1), "optim.dropout: unknown key; did you mean model.dropout?"),
    (dict(sampling__interval=3), "sampling.interval: unknown key; known: sampling.batch_size, sampling.ckpt_id, "
                                 "sampling.fid_stats"),
    (dict(datas__x=1), "datas: unknown key; did you mean data?"),
    # types
    (dict(optim__lr="fast"), "optim.lr: input should be a valid number, given 'fast'"),
    (dict(training__n_epochs=1.5), "training.n_epochs: input should be a valid integer, given 1.5"),
    (dict(training__n_epochs=True), "training.n_epochs: input should be a valid integer, given True"),
    (dict(data__random_flip="yes"), "data.random_flip: input should be a valid boolean, given 'yes'"),
    (dict(data__image_size="16"), "data.image_size: input should be a valid integer, given '16'"),
    (dict(model__ch_mult=[1, "a"]), "model.ch_mult: input should be a valid integer, given 'a'"),
    # ranges
    (dict(optim__lr=-1), "optim.lr: input should be greater than 0, given -1"),
    (dict(optim__lr=float("nan")), "optim.lr: input should be a finite number, given nan"),
    (dict(optim__lr=float("inf")), "optim.lr: input should be a finite number, given inf"),
    (dict(model__dropout=1.0), "model.dropout: input should be less than 1, given 1.0"),
    (dict(data__channels=2), "data.channels: input should be 1 or 3, given 2"),
    (dict(optim__optimizer="adam"), "optim.optimizer: input should be 'Adam', 'AdamW', 'Adafactor', 'RMSProp' or "
                                    "'SGD', given 'adam'"),
    # conflicts
    (dict(loss__num_consecutive_steps=0), "loss: num_consecutive_steps 0 with lamda 1.0 is not possible; "
                                          "use lamda 0 for the plain loss, or at least 1 consecutive step"),
    (dict(loss__num_consecutive_steps=1001), "loss.num_consecutive_steps 1001 exceeds "
                                             "diffusion.num_diffusion_timesteps 1000"),
    (dict(model__ch=48), "model.ch 48 * 1 (model.ch_mult) must be a multiple of 32"),
    (dict(data__channels=1), "model.in_channels 3 must equal data.channels 1"),
    (dict(data__image_size=15), "data.image_size 15 cannot be halved 1 times for model.ch_mult; "
                                "nearest valid: 14 and 16"),
    (dict(data__image_size=[16, 1]), "data.image_size 1 cannot be halved 1 times for model.ch_mult; nearest valid: 2"),
    (dict(data__logit_transform=True), "data: data.rescaled and data.logit_transform are both true; "
                                       "set one of them to false"),
])
def test_refuses_naming_key_value_and_what_is_allowed(changes, message):
    assert refusal(**changes) == message


def test_an_average_of_false_is_none():
    assert Config(**raw(training__ema=False)).training.ema == ()
    assert "no averages, given [0.9, False]" in refusal(training__ema=[0.9, False])


def test_counts_the_other_problems_and_puts_misspelt_keys_first():
    with pytest.raises(ConfigError, match=r"data.datset: unknown key; did you mean data.dataset\? \(and 1 more\)"):
        validate({"data": {"datset": "DIGITS", "image_size": 16}, "model": {}}, "c.yml")


@pytest.mark.parametrize(("override", "read"), [
    ("training.batch_size=64", lambda c: c.training.batch_size == 64),
    ("model.ch_mult=[1, 1, 2]", lambda c: c.model.ch_mult == (1, 1, 2)),
    ("optim.grad_clip=null", lambda c: c.optim.grad_clip is None),
    ("optim.grad_clip=1", lambda c: c.optim.grad_clip == 1.0),
    ("data.root=a=b", lambda c: c.data.root == "a=b"),
    ("data.random_flip=false", lambda c: c.data.random_flip is False),
])
def test_overrides(override, read):
    assert read(load_config("digits.yml", [override]))


def test_an_override_wins_over_a_file_that_says_it_in_another_form():
    training = load_config("edm/cifar10_ddpmpp.yml", ["training.n_epochs=3", "training.batch_size=4"]).training
    assert (training.limit, training.n_epochs) == ("n_epochs", 3)
    assert (training.global_batch_size, training.batch_size) == (None, 4)
    both = ["training.total_images=7k", "training.n_epochs=3"]                 # of two overrides none is set aside
    assert load_config("edm/cifar10_ddpmpp.yml", both) == load_config("edm/cifar10_ddpmpp.yml", both[::-1])
    assert load_config("edm/cifar10_ddpmpp.yml", both).training.total_images == 7000


def test_later_override_wins():
    assert load_config("digits.yml", ["training.seed=1", "training.seed=2"]).training.seed == 2


@pytest.mark.parametrize(("override", "message"), [
    ("training.batchsize=64", r"did you mean training.batch_size\?"),
    ("training.batch_size=", "training.batch_size: input should be a valid integer, given None"),
    ("training.batch_size=[", r"--training.batch_size \[, line 1: not usable YAML"),
    ("batch_size=64", "'batch_size=64' is not of the form section.key=value"),
    ("training.batch_size", "is not of the form"),
    ("model.num_res_blocks=1000000000", "num_res_blocks 1000000000 is beyond 1000"),
    ("model.ch=10000000000", "ch 10000000000 is beyond 65536"),
    ("model.ch_mult=[1, 99999999]", "ch_mult 99999999 is beyond 65536"),
    (f"model.ch_mult={[1] * 2000}", "ch_mult has 2000 entries, at most 1000"),
    ("=3", "is not of the form"),
    ("training.=3", "is not of the form"),
])
def test_refuses_overrides(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config("digits.yml", [override])


# Whatever is given, the answer is a configuration or a ConfigError.

KEYS = st.sampled_from([key.rpartition(".")[2] for key in dotted_keys()] + ["type", "n_iters", "last_only", "x"])
SCALARS = (st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.text(max_size=8)
           | st.sampled_from(["simple", "CIFAR10", "linear", "Adam"]))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=2),
                      max_leaves=4)
SECTIONS = st.sampled_from([*Config.model_fields, "other"])
FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(st.dictionaries(SECTIONS | st.integers(),
                       st.dictionaries(KEYS | st.text(max_size=3), VALUES, max_size=4) | VALUES, max_size=5))
def test_random_dictionaries(tmp_path, sections):
    for name, section in raw().items():                 # so that some get past what is required
        if isinstance(sections.get(name), dict):
            sections[name] = section | sections[name]
    (tmp_path / "c.yml").write_text(yaml.dump(raw() | sections, allow_unicode=True), encoding="utf-8")
    try:
        assert isinstance(load_config(tmp_path / "c.yml"), Config)
    except UserError as error:
        assert isinstance(error, ConfigError)


@FEW
@given(st.text(max_size=40) | st.builds("{}={}".format, st.sampled_from(list(dotted_keys())),
                                        st.text(max_size=12) | VALUES.map(repr)))
def test_random_overrides(override):
    try:
        assert isinstance(load_config("digits.yml", [override]), Config)
    except UserError as error:
        assert isinstance(error, ConfigError)


@FEW
@given(st.text(alphabet="abdt:{}[]!&*<>|-?'\"#,%@ \n0e", max_size=60))
def test_random_text(tmp_path, text):
    (tmp_path / "c.yml").write_text(text)
    with pytest.raises(ConfigError):                    # no such text has a data and a model section
        load_config(tmp_path / "c.yml")


def test_the_documentation_lists_every_key_as_it_is():
    documented = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert documented.read_text() == documentation() + "\n"
