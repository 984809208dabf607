"""Prompts to what a U-Net is conditioned on, by the text encoders of a pipeline folder.

Of SDXL: the penultimate hidden states of both encoders side by side, and the second one's pooled projection
(2307.01952, section 2.1). Of Stable Diffusion 1 and 2: the last hidden states. diffusers' own pipelines do it.
"""

import logging
from pathlib import Path

import torch
from torch import Tensor

from configs.pipelines import takes_sizes, text_classes, unet_settings, zeros_for_no_prompt
from models.pretrained import load_whole
from utils.errors import DataError
from utils.hub import needs_package, quiet_libraries

log = logging.getLogger(__name__)


class TextEncoders:
    """The text encoders of a pipeline, in float32.

    Args:
        folder: Of the pipeline.
        device: Where they compute.

    Raises:
        UserError: A library that is not installed. DataError: A folder without text encoders, or broken files.
    """

    def __init__(self, folder: Path, device="cpu"):
        self.folder, self.device = folder, torch.device(device)
        self.pooled = takes_sizes(unet_settings(folder))
        self.classes = text_classes(folder, self.pooled)
        self._warned = False
        self.pipeline = self._open().to(self.device, torch.float32)

    def _open(self):
        try:
            import transformers
            from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
        except ImportError as error:
            raise needs_package(error, "a text-to-image model") from None
        others = {"unet": None, "vae": None, "scheduler": None}
        if self.pooled:
            zeros = zeros_for_no_prompt(self.folder)
            made, others = StableDiffusionXLPipeline, {**others, "force_zeros_for_empty_prompt": zeros}
        else:
            made, others = StableDiffusionPipeline, {**others, "safety_checker": None, "feature_extractor": None,
                                                     "image_encoder": None, "requires_safety_checker": False}
        try:
            with quiet_libraries():
                return made(**{part: self._part(getattr(transformers, name), part)
                               for part, name in self.classes.items()}, **others)
        except DataError:
            raise
        except Exception as error:            # OSError, ValueError, SafetensorError, ...: whatever files do
            raise DataError(f"{self.folder}: text encoders not loaded: {' '.join(str(error).split())[:300]}") from None

    def _part(self, kind: type, part: str):
        """Not by the pipeline's own loader, which executes what the index of a stranger names."""
        folder = self.folder / part
        return load_whole(kind, folder) if "encoder" in part else kind.from_pretrained(folder, local_files_only=True)

    def _note_long(self, prompt: str) -> None:
        tokenizer = self.pipeline.tokenizer
        if not self._warned and len(tokenizer(prompt).input_ids) > tokenizer.model_max_length:
            self._warned = True
            log.warning("prompts of more than %d tokens are cut off, such as %r", tokenizer.model_max_length, prompt)

    @torch.no_grad()
    def __call__(self, prompt: str, negative: str | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What a prompt and what a negative prompt mean, float32 on the CPU, one row each.

        Args:
            negative: None: what the pipeline takes where none is given, the empty prompt; for SDXL that is zeros, as
                its ``force_zeros_for_empty_prompt`` says.

        Returns:
            ``prompt_embeds`` (1, L, D), and of SDXL ``pooled_embeds`` (1, P); twice.
        """
        with quiet_libraries():
            self._note_long(prompt)
            encoded = self.pipeline.encode_prompt(prompt=prompt, device=self.device, num_images_per_prompt=1,
                                                  do_classifier_free_guidance=True, negative_prompt=negative)
        names = ("prompt_embeds", "pooled_embeds") if self.pooled else ("prompt_embeds",)
        given, without = encoded[::2], encoded[1::2]
        return tuple({name: tensor.float().cpu() for name, tensor in zip(names, part, strict=True)}
                     for part in (given, without))
