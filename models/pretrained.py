"""U-Nets of diffusers as networks of this program: ``forward(x, t, **condition) -> F``, all of it or LoRA trained.

    condition       prompt_embeds (B, L, D), and of SDXL pooled_embeds (B, P) and time_ids (B, 6)

LoRA (2106.09685): a frozen layer W x becomes W x + (lora_alpha / lora_rank) B A x; A and B alone are trained.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.pipelines import UNETS, known_unet, unet_settings, zeros_for_no_prompt
from models.formats.diffusers import diffusers_folder
from utils.errors import DataError, UserError
from utils.files import open_regular
from utils.hub import local_folder, needs_package, quiet_libraries

# Parts of a pipeline beside its U-Net that decide what it makes of pictures and prompts.
ENCODERS = ("vae", "vqvae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
LORA_FILE = "pytorch_lora_weights.safetensors"


def folder_of(config) -> Path:
    """Where ``model.pretrained`` lies on this machine. UserError: nowhere, and the hub does not give it."""
    return local_folder(config.model.pretrained)


@cache
def _classes() -> dict[str, tuple[type, type]]:
    """Name in a pipeline's file -> (diffusers' class, ours with our forward). Imported when first needed: 2 s."""
    try:
        from diffusers import UNet2DConditionModel, UNet2DModel
    except ImportError as error:
        raise needs_package(error, "model.arch diffusers") from None

    class Adapted:
        @property
        def checkpointing(self) -> bool:
            """Whether activations are recomputed in the backward pass."""
            return self.is_gradient_checkpointing

        @checkpointing.setter
        def checkpointing(self, on: bool) -> None:
            (self.enable_gradient_checkpointing if on else self.disable_gradient_checkpointing)()

    class ImageUNet(Adapted, UNet2DModel):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x, t, return_dict=False)[0]

    class TextUNet(Adapted, UNet2DConditionModel):
        def forward(self, x: Tensor, t: Tensor, prompt_embeds: Tensor, pooled_embeds: Tensor | None = None,
                    time_ids: Tensor | None = None) -> Tensor:
            sizes = None if time_ids is None else {"text_embeds": pooled_embeds, "time_ids": time_ids}
            return super().forward(x, t, prompt_embeds, added_cond_kwargs=sizes, return_dict=False)[0]

    return dict(zip(UNETS, ((UNet2DModel, ImageUNet), (UNet2DConditionModel, TextUNet)), strict=True))


def build_pretrained(config) -> nn.Module:
    """The U-Net of ``model.pretrained`` with its weights in float32, and adapters where ``lora_rank`` asks for them.

    Raises:
        UserError: No such folder; a library that is not installed. DataError: Another kind of model, or broken files.
    """
    folder = folder_of(config)
    return _adapted(load_unet(folder / "unet", unet_settings(folder)), config.model)


def shape_of_pretrained(config, settings: dict) -> nn.Module:
    """The same network without numbers in it, on the meta device, from the settings of a U-Net."""
    theirs, _ = _classes()[settings["_class_name"]]
    with torch.device("meta"):
        return _adapted(theirs.from_config(settings), config.model)


def load_unet(folder: Path, settings: dict) -> nn.Module:
    """diffusers' own object from ``unet/``, in float32; safetensors only, which cannot hold code.

    Raises:
        DataError: Weights that are missing, broken or of another network.
    """
    theirs, _ = _classes()[settings["_class_name"]]
    _check_supported(folder, settings)
    try:
        check_size(theirs, settings, folder)
        return load_whole(theirs, folder).float()
    except DataError:
        raise
    except Exception as error:                # OSError, ValueError, SafetensorError, RuntimeError: whatever files do
        raise DataError(f"{folder}: not loaded: {' '.join(str(error).split())[:300]}") from None


def load_whole(kind: type, folder: Path) -> nn.Module:
    """A network of diffusers or transformers from safetensors files; the libraries make up what these lack.

    Raises:
        DataError: They lack some of it. Whatever from_pretrained raises.
    """
    with quiet_libraries():
        network, found = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True,
                                              output_loading_info=True)
    missing = {name for name in found["missing_keys"] if not name.endswith("position_ids")}      # they count 0, 1, ...
    lacking = sorted(missing | {name for name, *_ in found["mismatched_keys"]})
    if lacking:
        raise DataError(f"{folder}: not loaded: its files lack {len(lacking)} tensors of the network, such as "
                        f"{lacking[0]}; copy it again")
    return network


def check_size(kind: type, settings: dict, folder: Path) -> None:
    """DataError where a class of diffusers would make a larger network of these settings than the folder has weights
    for; whatever from_config raises where it makes none."""
    with quiet_libraries(), torch.device("meta"):
        claimed = sum(each.numel() for each in kind.from_config(settings).parameters())
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if claimed > stored:
        raise DataError(f"{folder}: not loaded: it claims {claimed:,} numbers, its safetensors files have {stored:,} "
                        "bytes")


def _check_supported(folder: Path, settings: dict) -> None:
    conditions = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")
    found = [f"{key} {settings[key]!r}" for key in conditions if settings.get(key) is not None]
    if settings.get("addition_embed_type") not in (None, "text_time"):
        found.append(f"addition_embed_type {settings['addition_embed_type']!r}")
    if found:
        raise DataError(f"{folder / 'config.json'}: conditions that are not known here: {', '.join(found)}")


def _adapted(unet: nn.Module, model) -> nn.Module:
    name = type(unet).__name__
    if model.lora_rank is not None:
        _add_lora(unet, model)
    unet.lora_scale = None if model.lora_rank is None else (model.lora_alpha or model.lora_rank) / model.lora_rank
    unet.__class__ = _classes()[name][1]      # a wrapper would put a prefix before every name of the state dict
    return unet


def _add_lora(unet: nn.Module, model) -> None:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise needs_package(error, "model.lora_rank") from None
    unet.requires_grad_(False)
    try:
        unet.add_adapter(LoraConfig(r=model.lora_rank, lora_alpha=model.lora_alpha or model.lora_rank,
                                    target_modules=list(model.lora_targets), init_lora_weights="gaussian"))
    except ValueError as error:
        raise UserError(f"model.lora_targets {', '.join(model.lora_targets)}: {str(error).split('. ')[0]}") from None


def plain_unet(unet: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """diffusers' own object with these weights, to be saved by diffusers."""
    theirs, _ = _classes()[_name_of(unet)]
    with torch.device("meta"):
        plain = theirs.from_config(dict(unet.config))
    plain.load_state_dict({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, assign=True)
    return plain


def _name_of(unet: nn.Module) -> str:
    return next(name for name, (_, ours) in _classes().items() if isinstance(unet, ours))


def pipeline_fingerprint(folder: Path, parts: Sequence[str]) -> str:
    """16 hexadecimal digits over the contents of these sub-folders of a pipeline, those that exist, and no prompt."""
    digest = hashlib.sha256()
    for part in parts:
        for file in sorted((folder / part).glob("*.*")) if (folder / part).is_dir() else ():
            digest.update(f"{part}/{file.name}".encode())
            with open_regular(file) as content:
                while block := content.read(1 << 22):
                    digest.update(block)
    if not zeros_for_no_prompt(folder):        # published ones say true, and keep their fingerprints
        digest.update(b"the empty prompt")
    return digest.hexdigest()[:16]


def is_pretrained(model: nn.Module) -> bool:
    """Whether ``model`` is a U-Net of diffusers, of which parts may be frozen."""
    return hasattr(model, "add_adapter")


def read_unet_folder(path: Path) -> dict[str, Tensor]:
    """The state dict in a ``unet/`` folder, or of the pipeline that holds one."""
    folder = diffusers_folder(path)
    return load_unet(folder, known_unet(folder / "config.json")).state_dict()


# ------------------------------------------------------------------------------------------------------- LoRA files


def lora_to_file(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Adapters under the names of ``load_lora_weights``; alpha / rank is multiplied into B, so that no reader has to
    know it."""
    return {f"unet.{name.replace('.default.', '.')}": (tensor * scale if ".lora_B." in name else tensor).contiguous()
            for name, tensor in state.items()}


def lora_from_file(state: dict[str, Tensor], metadata: dict[str, str], scale: float, where: Path) -> dict[str, Tensor]:
    """The inverse, for files of diffusers' present and older names.

    Args:
        metadata: Of the file, where diffusers notes rank and alpha.
        scale: alpha / rank of the network that takes them.

    Raises:
        DataError: No adapters of a U-Net, or more than those; adapters of another kind.
    """
    others = [name for name in sorted(state) if not name.startswith("unet.")]
    if len(others) == len(state):
        raise DataError(f"{where}: holds no adapters of a U-Net")
    if others:
        raise DataError(f"{where}: holds {others[0]}; adapters of a U-Net alone are known here, save them alone")
    names = {".lora.down.": ".lora_A.default.", ".lora.up.": ".lora_B.default.",
             ".lora_A.weight": ".lora_A.default.weight", ".lora_B.weight": ".lora_B.default.weight"}
    found, factor = {}, _noted_scale(metadata, where) / scale
    for name, tensor in state.items():
        bare = name.removeprefix("unet.")
        for theirs, ours in names.items():
            bare = bare.replace(theirs, ours)
        found[bare] = tensor * factor if ".lora_B." in bare else tensor
    return found


def _noted_scale(metadata: dict[str, str], where: Path) -> float:
    """alpha / rank as diffusers notes it; 1, as diffusers takes it, where a file has no note."""
    try:
        noted = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        odd = [key for key in ("alpha_pattern", "rank_pattern", "use_dora", "use_rslora") if noted.get(f"unet.{key}")]
        scale = noted.get("unet.lora_alpha", 1) / noted.get("unet.r", 1)
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise DataError(f"{where}: its lora_adapter_metadata are broken") from None
    if odd:
        raise DataError(f"{where}: adapters with {', '.join(odd)}, which are not known here")
    return scale
