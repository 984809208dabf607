"""Feeding images: packs against decoding, here and with torchvision's ImageFolder, on the same files.

    python -m benchmarks.data --source ../shared/data/cifar10-32x32.zip --num 10000

Batches of uint8 on the host, shuffled, without flips: those happen on the training device. The packs are read by one
thread; decoding has ``--workers`` processes.
"""

import argparse
import shutil
import tempfile
import time
import zipfile
from itertools import islice
from pathlib import Path

import torch

from benchmarks.harness import alternate, report
from configs.schema import Config
from datasets import build_dataset
from datasets.files import ImageFiles
from datasets.order import batch_indices, steps_per_epoch
from datasets.packed import ImageStore, open_images


def make_config(dataset: str, source: Path, side: int, **data) -> Config:
    return Config(data={"dataset": dataset, "image_size": side, "root": str(source), **data}, model={})


def torchvision_pipeline(folder: Path, side: int, batch: int, workers: int):
    """What the seeds do: ImageFolder, PIL, torchvision transforms, DataLoader."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side), transforms.PILToTensor()])
    loader = torch.utils.data.DataLoader(ImageFolder(folder, steps), batch, shuffle=True, num_workers=workers,
                                         drop_last=True)           # its workers start with each pass, like ours
    return lambda: sum(len(images) for images, _ in loader)


def store_pipeline(store: ImageStore, batch: int, epochs: int):
    """``epochs`` passes, so that a measurement takes long enough."""
    steps = epochs * steps_per_epoch(store.num_images, batch)

    def run() -> int:
        lists = (batch_indices(store.num_images, batch, step, seed=0) for step in range(steps))
        return sum(len(images) for images in store.batches(lists))
    return run


def extract(source: Path, folder: Path, num: int) -> None:
    """The first ``num`` files of a zip, as a tree."""
    with zipfile.ZipFile(source) as archive:
        for name in islice(ImageFiles(source).names, num):
            archive.extract(name, folder)


def start_times(source: Path, side: int, workers: int, root: Path) -> None:
    """Seconds to verify a whole archive, pack it, start a second time, and pack it again once it was touched."""
    copy = Path(shutil.copy(source, root))
    config = make_config("ZIP", copy, side, num_workers=workers, cache="mmap")

    def verify():
        dataset = build_dataset(config, root)
        return sum(image.numel() > 0 for image, _ in dataset)

    def pack():
        return open_images(config, root).num_images

    def touch_and_pack():
        copy.touch()
        return pack()

    print("| whole archive | seconds |\n|---|---|")
    for name, call in (("every image decoded, one process", verify),
                       (f"first start: packed, {workers} workers", pack), ("second start: pack reused", pack),
                       (f"archive touched: packed again, {workers} workers", touch_and_pack)):
        start = time.perf_counter()
        images = call()
        print(f"| {name} | {time.perf_counter() - start:.3f} ({images:,} images) |", flush=True)
    print()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="zip of square images of one size")
    parser.add_argument("--num", type=int, default=10_000, help="images that are decoded for the comparison")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    side = ImageFiles(args.source).read(0).shape[0]
    with tempfile.TemporaryDirectory() as temporary:
        start_times(args.source, side, args.workers, Path(temporary))
        folder = Path(temporary) / "images"
        extract(args.source, folder, args.num)
        calls = {"torchvision ImageFolder, PIL, DataLoader":
                 torchvision_pipeline(folder, side, args.batch, args.workers)}
        for cache in ("off", "mmap", "ram", "device"):
            config = make_config("FOLDER", folder, side, num_workers=args.workers, cache=cache)
            calls[f"data.cache {cache}"] = store_pipeline(
                open_images(config, temporary), args.batch, 1 if cache == "off" else 100)
        report(f"{args.num:,} images of {side}x{side}, batch {args.batch}, {args.workers} workers",
               alternate(calls, args.rounds), baseline=next(iter(calls)), precision="uint8",
               num=args.num, batch=args.batch, workers=args.workers)


if __name__ == "__main__":
    main()
