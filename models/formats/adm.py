"""guided-diffusion's, DDPM-IP's and ADM-ES's files, and the settings that can be read from their tensors.

A file is one bare state dict, whose name may tell what it is: ``ema_0.9999_010000.pt``, ``model010000.pt``. Not in any
tensor are the head count, the order of attention, dropout and the noise schedule: those come with the recipe.
"""

import re
from pathlib import Path

from models.formats.common import State, StoredWeights, bare, bare_name, is_state
from utils.errors import DataError

FILE = re.compile(r"(?:(?P<average>ema_[0-9.e+-]+)_|model)(?P<step>\d+)\.pt")
MARKS = {"time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight"}


def is_adm(path: Path, content) -> bool:
    return is_state(content) and {bare_name(name) for name in content} >= MARKS


def read_adm(path: Path, content: dict, ema: bool) -> StoredWeights:
    """The file's only set. The step is that of its name: guided-diffusion saves after it, with one update more."""
    named = FILE.fullmatch(path.name)
    kind = "unknown" if named is None else "ema" if named["average"] else "raw"
    return StoredWeights(bare(content, path, "content"), kind, int(named["step"]) if named else None)


def read_settings(state: State) -> dict:
    """What the tensors of an ADM network, or of its noisy classifier, say about the flags that made it.

    Args:
        state: By guided-diffusion's names.

    Returns:
        ``{flag: value}`` by the arguments of ``ADMUNet`` or ``ADMClassifier``, but for ``attention_factors``: how often
        smaller than the image the states with attention are; (2, 4) stands for 16 and 8 of 32 pixels.
        ``resblock_updown`` and ``conv_resample`` are absent where the tensors leave them open.

    Raises:
        DataError: The tensors are no ADM network.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    try:
        return _settings(shapes)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise DataError(f"no ADM network: its tensors do not fit together at {error}") from None


def _settings(shapes: dict[str, tuple]) -> dict:
    base, in_channels = shapes["time_embed.0.weight"][1], shapes["input_blocks.0.0.weight"][1]
    count = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("input_blocks."))
    if count > len(shapes):
        raise ValueError(f"{count:,} blocks")
    period, resampling = _levels(shapes, count)
    first = [f"input_blocks.{1 + start}." for start in range(0, count, period)]        # of each level
    widths = [shapes[f"{stage}0.out_layers.3.weight"][0] for stage in first]
    return {
        "num_channels": base,
        "in_channels": in_channels,
        "num_res_blocks": period - 1,
        "channel_mult": tuple(width // base if width % base == 0 else width / base for width in widths),
        "attention_factors": tuple(2**i for i, stage in enumerate(first) if f"{stage}1.qkv.weight" in shapes),
        "use_scale_shift_norm": shapes[f"{first[0]}0.emb_layers.1.weight"][0] == 2 * widths[0],
        **resampling,
        **_ends(shapes, in_channels, len(first)),
    }


def _levels(shapes: dict[str, tuple], count: int) -> tuple[int, dict]:
    """The distance between two levels in ``input_blocks``, and how the resolution changes between them."""
    for i in range(1, count):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            return i, {"resblock_updown": False, "conv_resample": True}
        if f"input_blocks.{i}.0.in_layers.0.weight" not in shapes:
            return i, {"resblock_updown": False, "conv_resample": False}               # pooling has no tensors
    if "out.2.positional_embedding" in shapes:
        period = _classifier_period(shapes, count)
    else:                                                      # the first that doubles ends the lowest level
        doubling = [int(name.split(".")[1]) for name in shapes
                    if re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight", name)]
        period = 1 + min(doubling, default=count - 1)
    return period, {"resblock_updown": True} if period < count else {}


def _classifier_period(shapes: dict[str, tuple], count: int) -> int:
    """The shortest that fits: blocks that halve have no attention and no other width, the rest of a level agrees."""
    attention = [f"input_blocks.{i}.1.qkv.weight" in shapes for i in range(count)]
    widens = [f"input_blocks.{i}.0.skip_connection.weight" in shapes for i in range(count)]
    for period in range(2, count):
        halving = range(period, count, period)
        levels = [set(attention[start + 1:start + period]) for start in range(0, count, period)]
        if count % period == 0 and not any(attention[i] or widens[i] for i in halving) and max(map(len, levels)) == 1:
            return period
    return count


def _ends(shapes: dict[str, tuple], in_channels: int, levels: int) -> dict:
    """What the embedding of labels and the last layer say."""
    if "out.2.positional_embedding" in shapes:
        side = round((shapes["out.2.positional_embedding"][1] - 1) ** 0.5)
        return {"image_size": side * 2 ** (levels - 1), "num_outputs": shapes["out.2.c_proj.weight"][0]}
    return {"learn_sigma": shapes["out.2.weight"][0] == 2 * in_channels,
            "num_classes": shapes.get("label_emb.weight", (0,))[0]}
