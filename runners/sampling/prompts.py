"""Prompts of generate.py: from flags and files to conditions."""

from pathlib import Path

from models.text import TextEncoders
from runners.conditioning import TypedPrompts
from utils.errors import DataError, UserError
from utils.files import MIB, read_regular
from utils.hub import local_folder

SEEDS_OF_A_PROMPT = 4                                # unless --seeds or --num_samples says otherwise


def read_prompts(path: str) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        DataError: No such file, or no text in it. UserError: No prompts in it.
    """
    try:
        text = read_regular(Path(path), 64 * MIB, "list of prompts").decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise DataError(f"--prompt_file {path}: not a text file in UTF-8; give one prompt on each line")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"--prompt_file {path}: holds no prompts; give one on each line")
    return prompts


def prompts_of(job, device) -> TypedPrompts | None:
    """What the images of a SamplingJob are made of; None for networks that take no text."""
    if not job.prompts:
        return None
    encoders = TextEncoders(local_folder(job.config.model.pretrained), device)
    return TypedPrompts(job.prompts, job.args.negative_prompt, encoders, job.config.data)
