"""The data sets: where each lies, which reader opens it, what happens to its images. Every format is described in
docs/data.md."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from configs.schema import Data
from datasets import arrays, captions, lmdbs
from datasets.celeba import CelebA
from datasets.download import download_cifar10
from datasets.files import ImageFiles
from datasets.labels import FILE_RULES
from datasets.reader import Reader
from utils.errors import DataError, UserError, choose
from utils.names import safe_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetSpec:
    layout: str
    """What is expected on disk, for people."""
    needs: Callable[[Data, str], tuple[str, ...]]
    """(data, split) -> glob patterns that must all match in the data set's folder; () accepts the path as it is."""
    read: Callable[[Path, Data, str], Reader]
    """(folder, data, split) -> the images."""
    folders: tuple[str, ...] = ()
    """Where the data set's folder may lie below the folder that holds data sets; () means data.root itself."""
    transform: str = "none"
    """Name in datasets.images.TRANSFORMS."""
    official_split: bool = False
    """train and test lie apart on disk."""
    held_out: float | None = None
    """Published fraction of a fixed random split; none: data.validation_fraction counts."""
    usual_sizes: dict[str | None, int] = field(default_factory=lambda: {None: 50_000})
    """data.category -> training images of the published set; None: of any other category."""
    download: Callable[[Path], None] | None = None
    """Fetches the data set into the folder that holds data sets."""
    bundled: Callable[[], Path] | None = None
    """Finds a data set that comes with a library; ``read`` gets this path."""

    def usual_size(self, data: Data) -> int:
        """Training images of the published set: what a dry run assumes where the data are absent."""
        return self.usual_sizes.get(data.category, self.usual_sizes[None])


def read_any(path: Path, data: Data, split: str, strict: bool = False, auto: str = "auto") -> Reader:
    """A folder, zip, npz, npy, LMDB or CIFAR-10 archive, by what it looks like. ``auto``: what it means for labels."""
    return open_any(path, data.channels, strict, auto if data.labels == "auto" else data.labels)


def open_any(path: Path, channels: int, strict: bool = False, labels: str = "auto") -> Reader:
    """As ``read_any``, without a configuration.

    Raises:
        DataError: Of no known kind.
        UserError: Labels from folders or file names where there are none.
    """
    kind = "lmdb" if (path / "data.mdb").is_file() else "folder" if path.is_dir() else path.suffix.lower()
    if kind not in READERS:
        raise DataError(f"{path}: unknown kind of source; known: {', '.join(sorted(READERS))}")
    choose(FILE_RULES, labels, "data.labels")
    if labels in ("folders", "filenames") and kind not in IMAGE_FILES:
        raise UserError(f"data.labels {labels} needs a folder or zip of image files; {path} is neither")
    return READERS[kind](path, channels, strict, labels)


IMAGE_FILES = ("folder", ".zip")
READERS = {
    **dict.fromkeys(IMAGE_FILES, ImageFiles),
    ".npz": lambda path, channels, *_: arrays.ArrayImages([path], arrays.npz_images, channels),
    ".npy": lambda path, channels, *_: arrays.ArrayImages([path], arrays.npy_images, channels),
    ".gz": lambda path, channels, *_: arrays.ArrayImages([path], arrays.cifar10_tar, channels),
    "lmdb": lambda path, channels, *_: lmdbs.LmdbImages(path, channels, lmdbs.any_keys),
    ".mdb": lambda path, channels, *_: lmdbs.LmdbImages(path, channels, lmdbs.any_keys),
}


def read_cifar10(folder: Path, data: Data, split: str) -> Reader:
    names = {"train": arrays.CIFAR10_BATCHES, "test": ("test_batch",)}[split]
    return arrays.ArrayImages([folder / name for name in names], arrays.cifar10_batch, data.channels)


def read_celebahq(folder: Path, data: Data, split: str) -> Reader:
    return lmdbs.LmdbImages(folder / CELEBAHQ_SPLITS[split], data.channels, lmdbs.numbered_keys)


def read_lsun(folder: Path, data: Data, split: str) -> Reader:
    return lmdbs.LmdbImages(folder / lsun_needs(data, split)[0], data.channels, lmdbs.all_keys)


def read_ffhq(folder: Path, data: Data, split: str) -> Reader:
    return lmdbs.LmdbImages(folder, data.channels, partial(lmdbs.resolution_keys, data.height))


def read_imagenet(folder: Path, data: Data, split: str) -> Reader:
    found = {int(m[1]): path for path in folder.glob("train_data_batch_*.npz")
             if (m := re.fullmatch(r"train_data_batch_(\d+)\.npz", path.name))}
    if split == "train" and sorted(found) != list(range(1, len(found) + 1)):
        raise DataError(f"{folder}: has train_data_batch_ {sorted(found)}, expected 1 to 10 without a gap")
    if split == "train" and len(found) < 10:
        log.warning("%s: only %d of the 10 batches of downsampled ImageNet are there", folder, len(found))
    files = {"train": [found[i] for i in sorted(found)], "test": [folder / "val_data.npz"]}[split]
    return arrays.ArrayImages(files, partial(arrays.imagenet_batch, data.height, data.width), data.channels)


def read_captioned(folder: Path, data: Data, split: str) -> Reader:
    return captions.open_captioned(folder, data.channels)


def find_digits() -> Path:
    package = find_spec("sklearn")                         # does not import it, which takes 2 s
    if package is None:
        raise DataError("DIGITS comes with scikit-learn, which is not installed: pip install scikit-learn")
    return Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"


def read_digits(file: Path, data: Data, split: str) -> Reader:
    return arrays.ArrayImages([file], arrays.digits, data.channels)


def lsun_needs(data: Data, split: str) -> tuple[str]:
    if not data.category:
        raise UserError("data.category None must name the LSUN category, e.g. church_outdoor or bedroom")
    safe_name("data.category", data.category, one_part=True)
    return (f"{data.category}_{'train' if split == 'train' else 'val'}_lmdb",)


def needs_image(data: Data, split: str) -> tuple[str]:
    return ("*",)


LSUN_SIZES = {
    None: 126_227, "bedroom": 3_033_042, "bridge": 818_687, "church_outdoor": 126_227, "classroom": 168_103,
    "conference_room": 229_069, "dining_room": 657_571, "kitchen": 2_212_277, "living_room": 1_315_802,
    "restaurant": 626_331, "tower": 708_264, "cat": 1_657_266, "horse": 2_000_340}
CELEBAHQ_SPLITS = {"train": "train.lmdb", "test": "validation.lmdb"}
IMAGENET = DatasetSpec(
    layout="imagenet32/ or imagenet64/ with train_data_batch_1.npz to train_data_batch_10.npz (test: val_data.npz)",
    needs=lambda data, split: ({"train": "train_data_batch_1.npz", "test": "val_data.npz"}[split],),
    read=read_imagenet, official_split=True, usual_sizes={None: 1_281_167})

DATASETS = {
    "CIFAR10": DatasetSpec(
        layout="cifar10/cifar-10-batches-py/ with data_batch_1 to data_batch_5 and test_batch",
        needs=lambda data, split: ({"train": "data_batch_1", "test": "test_batch"}[split],),
        read=read_cifar10, official_split=True, download=download_cifar10,
        folders=("cifar10/cifar-10-batches-py", "cifar10_test/cifar-10-batches-py", "cifar-10-batches-py", ".")),
    "CELEBA": DatasetSpec(
        layout="celeba/img_align_celeba/*.jpg and celeba/list_eval_partition.txt (or both in celeba/celeba/)",
        needs=lambda data, split: ("img_align_celeba", "list_eval_partition.txt"),
        read=lambda folder, data, split: CelebA(folder, split, data.channels),
        folders=("celeba", "celeba/celeba", "."), transform="celeba", official_split=True, usual_sizes={None: 162_770}),
    "CELEBAHQ": DatasetSpec(
        layout="celebahq-lmdb/train.lmdb and celebahq-lmdb/validation.lmdb (or in celebahq/)",
        needs=lambda data, split: (CELEBAHQ_SPLITS[split],),
        read=read_celebahq, folders=("celebahq-lmdb", "celebahq", "."),
        transform="resize", official_split=True, usual_sizes={None: 27_000}),
    "FFHQ64": DatasetSpec(
        layout="ffhq64/SUB/*.png, any depth", needs=needs_image, read=partial(read_any, auto="json"),
        folders=("ffhq64",), transform="resize", usual_sizes={None: 70_000}),
    "AFHQ": DatasetSpec(
        layout="afhq/SUB/*.jpg, any depth", needs=needs_image, read=read_any, folders=("afhq",),
        transform="resize", usual_sizes={None: 14_630}),
    "LSUN": DatasetSpec(
        layout="lsun/CATEGORY_train_lmdb/ and lsun/CATEGORY_val_lmdb/", needs=lsun_needs, read=read_lsun,
        folders=("lsun", ".", ".."), transform="resize-center-crop", official_split=True,
        usual_sizes=LSUN_SIZES),
    "FFHQ": DatasetSpec(
        layout="FFHQ/data.mdb with keys RESOLUTION-00000 and length", needs=lambda data, split: ("data.mdb",),
        read=read_ffhq, folders=("FFHQ", "."), held_out=0.1, usual_sizes={None: 63_000}),
    "IMAGENET32": replace(IMAGENET, folders=("imagenet32", ".")),
    "IMAGENET64": replace(IMAGENET, folders=("imagenet64", ".")),
    "ZIP": DatasetSpec(
        layout="data.root names an EDM/StyleGAN zip archive of images of one size, with dataset.json for labels",
        needs=lambda data, split: (), read=partial(read_any, strict=True)),
    "FOLDER": DatasetSpec(
        layout="data.root names a tree of images (or an npz with arr_0, an npy, a zip)",
        needs=lambda data, split: (), read=read_any, transform="resize-center-crop"),
    "CAPTIONS": DatasetSpec(
        layout="data.root names a folder with metadata.jsonl (file_name, text), or with tar shards of NAME.jpg and "
               "NAME.txt", needs=lambda data, split: (), read=read_captioned, transform="resize-center-crop"),
    "DIGITS": DatasetSpec(
        layout="bundled with scikit-learn", needs=lambda data, split: (), read=read_digits, bundled=find_digits,
        transform="resize", usual_sizes={None: 1_797}),
}
