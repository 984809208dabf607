"""Data sets by name: find one on disk, open it as a configuration asks for it.

The hot loop does not use this: it takes whole batches from ``datasets.packed`` in the order of ``datasets.order``.
"""

from functools import partial
from pathlib import Path

from datasets.image_dataset import ImageDataset, Subset, held_out, limited
from datasets.specs import DATASETS, DatasetSpec
from utils.errors import DataError, UserError, choose

__all__ = ["DATASETS", "DEFAULT_ROOT", "DatasetSpec", "build_dataset", "check_held_out", "find_dataset", "open_dataset"]

DEFAULT_ROOT = "exp/datasets"
SPLITS = {"train": "", "test": "-test"}


def find_dataset(config, root=None, split: str = "train", download: bool = False) -> Path:
    """Where the data set lies; reads no image.

    Args:
        config: The configuration; ``data.root`` wins over ``root``, and may be the data set's folder or its parent.
        root: The folder that holds data sets, default ``exp/datasets``.
        split: ``train`` or ``test``.
        download: Fetch it where that is possible.

    Raises:
        DataError: Not there; shows where it looked and the expected layout.
        UserError: Unknown name or split, or a setting that the data set needs is not given.
    """
    data = config.data
    spec = choose(DATASETS, data.dataset, "data.dataset")
    choose(SPLITS, split, "split")
    if spec.bundled:
        return spec.bundled()
    places = _places(spec, data, root)
    needs = spec.needs(data, split)
    for place in places:
        if place.exists() and all(any(place.glob(pattern)) for pattern in needs):
            return place.absolute()
    if download and spec.download and data.root is None:
        spec.download(Path(root or DEFAULT_ROOT))
        return find_dataset(config, root, split)
    wanted = f" ({', '.join(needs)})" if needs else ""
    raise DataError(f"{data.dataset} not found; looked for its {split} images{wanted} in "
                    f"{', '.join(map(str, places))}; expected: {spec.layout}; {_advice(data)}")


def _advice(data) -> str:
    if data.root and not Path(data.root).expanduser().exists():
        return f"data.root {data.root}: there is no such file or folder"
    if data.root and Path(data.root).suffix == ".zip":
        return f"data.root {data.root} is an archive: give data.dataset ZIP (or FOLDER, which also resizes)"
    return "set data.root to its folder"


def _places(spec: DatasetSpec, data, root) -> list[Path]:
    if data.root is not None:
        base = Path(data.root).expanduser()
        return [base / folder for folder in dict.fromkeys((*spec.folders, "."))]
    base = Path(root or DEFAULT_ROOT)
    if not spec.folders and not base.is_file():
        raise UserError(f"{data.dataset} needs data.root: {spec.layout}")
    return [base / folder for folder in spec.folders] or [base]


def open_dataset(config, root=None, split: str = "train") -> ImageDataset:
    """The data set with its split and transform; decodes nothing yet. CIFAR10 is downloaded if it is absent.

    Raises:
        DataError, UserError: As ``find_dataset``; or the split has no images.
    """
    data = config.data
    folder = find_dataset(config, root, split, download=True)
    spec = DATASETS[data.dataset]
    reader = spec.read(folder, data, split)
    fraction = spec.held_out or data.validation_fraction
    if spec.official_split:
        fraction = None
    elif fraction:
        reader = Subset(reader, partial(held_out, fraction, split))
    elif split == "test":
        check_held_out(config, root)
    if data.max_size:
        reader = Subset(reader, partial(limited, data.max_size))
    return ImageDataset(data.dataset.lower() + SPLITS[split], reader, spec.transform, data.shape,
                        (str(folder), data.category, split, fraction, data.labels, data.max_size),
                        labelled=data.labels != "none")


def check_held_out(config, root=None) -> None:
    """DataError if the configuration has no split ``test``, or its files are not there."""
    spec = choose(DATASETS, config.data.dataset, "data.dataset")
    if not (spec.official_split or spec.held_out or config.data.validation_fraction):
        raise DataError(f"{config.data.dataset} has no official test images; set data.validation_fraction to hold some "
                        "out")
    find_dataset(config, root, "test")


def build_dataset(config, root=None, split: str = "train"):
    """A ``torch.utils.data.Dataset`` of ``(uint8 tensor (C, H, W), int label)``, label -1 where there is none.

    Raises:
        DataError, UserError: As ``open_dataset``; items raise DataError naming an image that cannot be used.
    """
    from datasets.items import DecodedImages  # imports torch, which verify and convert do without

    return DecodedImages(open_dataset(config, root, split))
