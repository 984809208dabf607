"""The typed configuration, read from YAML and checked as a whole. ``python -m configs.schema`` prints all keys."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Union

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticUndefined

from configs.base import Section
from configs.messages import describe
from configs.networks import NETWORKS
from configs.pipelines import fill_in, is_pipeline, pipeline_configuration
from configs.reading import OLD_AVERAGE, convert_ddim_form, drop_other_form, find_config, parse_yaml, read_config_file
from configs.sections import PRECONDITIONED, Data, DiffusionSection, Sampling
from configs.training import Loss, Optim, Training
from configs.unread import check_all_are_read, pass_over_betas
from utils.atomic import write_text
from utils.errors import ConfigError
from utils.hub import settings_folder

AUGMENT_DIM = 9                              # numbers that tell of data.augment


AnyNetwork = Annotated[Union[tuple(NETWORKS.values())], Field(discriminator="arch")]  # noqa: UP007


class Config(Section):
    """All settings of a run. ``Config(data={...}, model={...})`` is valid: all else has defaults.

    Raises:
        pydantic.ValidationError: Unknown key, wrong type, value out of range or in conflict with another.
    """

    data: Data
    model: AnyNetwork
    diffusion: DiffusionSection = DiffusionSection()
    loss: Loss = Loss()
    training: Training = Training()
    sampling: Sampling = Sampling()
    optim: Optim = Optim()

    @model_validator(mode="before")
    @classmethod
    def _read_older_forms(cls, raw: Any):
        """``model.arch`` defaults to unet; the average's keys were in ``model``, as they still are in DDIM's files."""
        if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict):
            return raw
        model = {"arch": "unet", **raw["model"]}
        old = {key: model.pop(key) for key in OLD_AVERAGE if key in model}
        training = raw.get("training", {})
        if old and isinstance(training, dict):
            if "ema" in training:
                raise ValueError(f"training.ema and model.{next(iter(old))} are both given; give training.ema alone")
            average = {"rate": old.get("ema_rate", 0.9999), "warmup": old.get("ema_warmup", False)}
            training = {**training, "ema": [average] if old.get("ema", True) else []}
        return {**raw, "model": model, "training": training}

    @model_validator(mode="after")
    def _sections_agree(self):
        self.model.check(self.data)
        check_all_are_read(self)
        loss, diffusion = self.loss, self.diffusion
        if loss.num_consecutive_steps > diffusion.chain_length:
            name = "num_diffusion_timesteps" if diffusion.schedule == "discrete" else "rungs"
            name = "timestep_respacing" if diffusion.timestep_respacing else name
            raise ValueError(f"loss.num_consecutive_steps {loss.num_consecutive_steps} exceeds diffusion.{name} "
                             f"{diffusion.chain_length}")
        if diffusion.schedule == "discrete" and self.training.sample_timesteps > diffusion.chain_length:
            raise ValueError(f"training.sample_timesteps {self.training.sample_timesteps} exceeds the "
                             f"{diffusion.chain_length} steps of the chain; give 1 to {diffusion.chain_length}")
        self._bound_has_its_terms()
        if self.training.time_sampler == "loss_second_moment" and diffusion.schedule != "discrete":
            raise ValueError("training.time_sampler loss_second_moment counts the losses of steps; "
                             f"diffusion.schedule {diffusion.schedule} has none")
        if self.training.label_dropout and not self.model.conditional:
            raise ValueError(f"training.label_dropout {self.training.label_dropout} needs a network with labels or "
                             "prompts; set model.num_classes, or label_dim of EDM's networks")
        if self.data.augment and getattr(self.model, "augment_dim", 0) != AUGMENT_DIM:
            raise ValueError(f"data.augment {self.data.augment} needs a network that is told of it: model.arch "
                             f"songunet or dhariwal, with model.augment_dim {AUGMENT_DIM}")
        return self

    def _bound_has_its_terms(self):
        """Learned variances are learned, and what the variational bound is about is there."""
        kind, learned, data = self.loss.variational, self.model.learns_variance, self.data
        if kind == "none" and learned:
            raise ValueError("model.learn_sigma: nothing trains the variances with loss.variational none; set it to "
                             "hybrid or rescaled_hybrid")
        if kind == "none":
            return
        if "hybrid" in kind and not learned:
            raise ValueError(f"loss.variational {kind} needs a network that learns variances; set it to none, or "
                             "model.learn_sigma to true")
        if self.diffusion.schedule != "discrete":
            raise ValueError(f"loss.variational {kind} needs diffusion.schedule discrete")
        if not self.diffusion.set_alpha_to_one:
            raise ValueError(f"loss.variational {kind} needs a chain that ends at the image; set "
                             "diffusion.set_alpha_to_one to true")
        if learned and self.diffusion.prediction in PRECONDITIONED:
            raise ValueError(f"model.learn_sigma: diffusion.prediction {self.diffusion.prediction} reads no variances; "
                             "use epsilon, v_prediction or sample")
        if not data.rescaled or data.uniform_dequantization or data.gaussian_dequantization:
            raise ValueError(f"loss.variational {kind} measures the 256 levels of pixels in [-1, 1]; it needs "
                             "data.rescaled, and no dequantization")
        if self.model.latent:
            raise ValueError(f"loss.variational {kind} measures the 256 levels of pixels; {self.model.pretrained} "
                             "diffuses an autoencoder's latents, which have none: set it to none")

    def replace(self, key: str, value) -> "Config":
        """A checked copy with another value of one dotted key, such as ``config.replace("loss.lamda", 0.5)``.

        Raises:
            ConfigError: An unknown key, or a value that is not possible.
        """
        section, _, name = key.partition(".")
        raw = self.model_dump(mode="json")
        if not name or section not in raw:
            raise ConfigError(f"key {key!r} is not of the form section.key; sections: {', '.join(raw)}")
        raw[section][name] = value
        pass_over_betas(raw, {key})
        return validate(raw, "replace")


def load_config(path: str | Path, overrides: Sequence[str] = (), pipeline: Path | None = None) -> Config:
    """Read a YAML file in this project's, SA-DPM's or DDIM's form, or the folder of a diffusers pipeline.

    Of a network of diffusers the scheduler's file fills in the ``diffusion`` section, and must not contradict it.

    Args:
        path: A file, a name looked up in configs/, or a pipeline folder.
        overrides: ``"training.batch_size=64"``, values parsed as YAML; they win over the file.
        pipeline: Folder that takes the place of ``model.pretrained``, where the network is one of diffusers.

    Raises:
        ConfigError: With the file, the dotted key, what was given and what is allowed.
    """
    if is_pipeline(Path(path)):
        raw = pipeline_configuration(Path(path))
    else:
        path = find_config(path)
        raw = read_config_file(path)
    raw = with_overrides(raw, overrides)
    return validate(_with_pipeline(convert_ddim_form(raw, path), pipeline), str(path))


def _with_pipeline(raw: dict, pipeline: Path | None) -> dict:
    """The configuration and what the files of ``model.pretrained`` add, where these can be had."""
    model = raw.get("model") or {}
    if model.get("arch") != "diffusers":
        return raw
    if pipeline:
        raw = {**raw, "model": {**model, "pretrained": str(pipeline)}}
    name = raw["model"].get("pretrained")
    folder = settings_folder(name) if isinstance(name, str) else None
    return fill_in(raw, folder) if folder else raw


def with_overrides(raw: dict, overrides: Sequence[str]) -> dict:
    """Nested dictionaries with ``"section.key=value"`` put in; changes and returns ``raw``."""
    for override in overrides:
        drop_other_form(raw, override.partition("=")[0])
    for override in overrides:
        key, given, text = override.partition("=")
        section, dot, name = key.partition(".")
        if not (section and dot and name and given):
            raise ConfigError(f"override {override!r} is not of the form section.key=value")
        raw.setdefault(section, {})[name] = parse_yaml(text, f"--{key} {text}")
    pass_over_betas(raw, {override.partition("=")[0] for override in overrides})
    return raw


def validate(raw: dict, where: str) -> Config:
    """Check nested dictionaries; raises ConfigError naming ``where``."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        by_key = {}                                                 # a union reports each of its members: keep one
        for problem in error.errors(include_url=False):
            problem["loc"] = _without_arch(problem["loc"])
            by_key.setdefault(problem["loc"][:2], problem)
        # Unknown keys first: a misspelt one is often why another is missing.
        known = [*dotted_keys(_arch(raw)), *Config.model_fields]
        problems = [describe(p, known) for p in sorted(by_key.values(), key=lambda p: p["type"] != "extra_forbidden")]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{where}: {problems[0]}{more}") from None


def save_config(config: Config, path: str | Path) -> None:
    """Write YAML that ``load_config`` reads back to an equal object."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _without_arch(loc: tuple) -> tuple:
    """("model", "unet", "ch") -> ("model", "ch"): a tagged union puts its tag in between."""
    return ("model", *loc[2:]) if loc[:1] == ("model",) and len(loc) > 1 and loc[1] in NETWORKS else loc


def sections() -> Iterator[tuple[str, type[Section]]]:
    """("data", Data), ...; ``model`` comes once for each arch."""
    for name, field in Config.model_fields.items():
        if name == "model":
            yield from ((name, network) for network in NETWORKS.values())
        else:
            yield name, field.annotation


def dotted_keys(arch: str | None = None) -> dict[str, tuple]:
    """``{"data.dataset": (annotation, default, help), ...}`` of every key, or of those that go with one arch."""
    return {f"{name}.{key}": (field.annotation, field.get_default(), field.description)
            for name, section in sections() if name != "model" or arch not in NETWORKS or section is NETWORKS[arch]
            for key, field in section.model_fields.items()}


def _arch(raw: dict) -> str | None:
    model = raw.get("model") if isinstance(raw, dict) else None
    arch = model.get("arch", "unet") if isinstance(model, dict) else None
    return arch if isinstance(arch, str) else None


def documentation() -> str:
    """docs/configuration.md."""
    lines = ["# Configuration", "", "Made by `python -m configs.schema`. Any key can be overridden on the command "
             "line: `--training.batch_size 64`.", "", "| key | default | meaning |", "|---|---|---|"]
    for name, section in sections():
        arch = f" ({section.model_fields['arch'].default})" if name == "model" else ""
        for key, field in section.model_fields.items():
            default = field.get_default()
            shown = "required" if default is PydanticUndefined else json.dumps(default, default=lambda d: dict(d))
            lines.append(f"| `{name}.{key}`{arch} | {shown} | {' '.join(field.description.split())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(documentation())
