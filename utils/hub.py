"""Folders of models: on this machine, or from the Hugging Face hub where that can be reached."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import UserError

# What a pipeline folder is read from; never pickles, never code.
WANTED = ["model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors"]
SETTINGS = WANTED[:2]                                        # what says what it is
UNWANTED = ["*.fp16.*", "*/openvino*", "*/*flax*", "*/*onnx*"]
HUB_NAME = r"[\w.-]+/[\w.-]+"                                # owner/model


def local_folder(name: str, what: str = "model.pretrained", download: bool = True,
                 wanted: list[str] = WANTED) -> Path | None:
    """The folder that ``name`` means: a path, or ``owner/model`` of the hub, from the cache or downloaded.

    Args:
        download: False looks only at what is on this machine, and gives None where a hub's model is not.
        wanted: Files to download.

    Raises:
        UserError: No such folder, and no model of the hub that could be had.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(HUB_NAME, name) or folder.exists():
        raise UserError(f"{what} {name!r}: no such folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return _without_hub(name, what, download, "the package huggingface_hub is not installed")
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=UNWANTED,
                                      local_files_only=not download))
    except Exception as error:                # no network, no such model, no right to it, each in many classes
        return _without_hub(name, what, download, str(error).partition("\n")[0] or type(error).__name__)


def settings_folder(name: str) -> Path | None:
    """The folder that ``name`` means, of a hub's model perhaps without weights; None where that cannot be had.

    Raises:
        UserError: No such folder.
    """
    folder = local_folder(name, download=False)
    if folder is None or not (folder / "scheduler").is_dir():            # some programs fetch a part of a model alone
        with suppress(UserError):
            return local_folder(name, wanted=SETTINGS)
    return folder


def _without_hub(name: str, what: str, download: bool, reason: str) -> None:
    if download:
        raise UserError(f"{what} {name!r}: no such folder, and the hub does not give a model of that name: {reason}")


def needs_package(error: ImportError, what: str) -> UserError:
    """One line about an optional library that is missing."""
    return UserError(f"{what} needs the package {error.name or 'diffusers'}: pip install 'diffusers>=0.33' "
                     "'transformers>=4.44' 'peft>=0.15' accelerate (the extra text2image of pyproject.toml)")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Load a model without the libraries' bars and advice, which are about their own ways of being called."""
    from diffusers.utils import logging as diffusers_logging

    libraries = [diffusers_logging]
    try:
        from transformers.utils import logging as transformers_logging
        libraries.append(transformers_logging)
    except ImportError:
        pass
    before = [each.get_verbosity() for each in libraries]
    for each in libraries:
        each.set_verbosity(logging.CRITICAL)                 # what they cannot load is told once, by us
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each, level in zip(libraries, before, strict=True):
            each.set_verbosity(level)
