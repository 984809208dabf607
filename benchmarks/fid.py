"""FID here and in pytorch-fid, in turn in one run: features, distance, and whether the two agree.

    python -m benchmarks.fid --images ../shared/data/cifar10-32x32.zip                 # speed, a few minutes
    python -m benchmarks.fid --images ../shared/data/cifar10-32x32.zip --agree 2000    # and 2,000 against 2,000 others
    python -m benchmarks.fid --images ... --device cuda --num 2000                     # features on a GPU

The distance is computed on the CPU in any case.
"""

import json
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.harness import RESULTS, alternate, alternate_apart, arguments, machine, report, synchronize
from benchmarks.workload import as_scripts_do
from functions.frechet import FeatureStats, frechet_distance
from models.inception import load_inception
from models.inception_weights import find_weights, read_weights
from runners.evaluation.metrics import Collector, FileSource, choose_subset, evaluate_images
from utils.atomic import atomic_write


def pytorch_fid_network(weights=None, device="cpu"):
    """pytorch-fid's InceptionV3 with the weights that we found, instead of its download."""
    import pytorch_fid.inception as theirs

    from models.inception import _build

    path, _ = find_weights(weights)
    state = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008), **read_weights(path, _build())}
    theirs.load_state_dict_from_url = lambda *args, **kwargs: state
    return theirs.InceptionV3([3]).eval().to(device)


def extract(source: FileSource, indices, folder: Path) -> list[str]:
    """Images as PNG files, which is what pytorch-fid reads."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:06d}.png" for i in indices]
    for i, file in zip(indices, files, strict=True):
        Image.fromarray(source.reader.read(int(i))).save(file)
    return [str(file) for file in files]


def timed(function):
    synchronize()
    start = time.perf_counter()
    value = function()
    synchronize()
    return value, time.perf_counter() - start


def features_speed(source, num: int, rounds: int, folder: Path, device: str) -> None:
    """From PNG files to features."""
    files = extract(source, choose_subset(len(source), num, 0, source.name), folder)
    makers = {"pytorch-fid": partial(pass_of_pytorch_fid, files, device), "here": partial(pass_here, folder, device)}
    report(f"Inception features of {num} PNG files, {device}", alternate_apart(makers, rounds), baseline="pytorch-fid",
           num=num)


def pass_of_pytorch_fid(files: list[str], device: str):
    from pytorch_fid.fid_score import get_activations

    network = pytorch_fid_network(device=device)
    return lambda: len(get_activations(files, network, 50, 2048, device, num_workers=2))


def pass_here(folder: Path, device: str):
    as_scripts_do(device)
    network, images = load_inception(device=device), FileSource(folder)

    def run() -> int:
        collector = Collector(network)
        evaluate_images(images, collector, 50)
        return collector.stats.count

    return run


def distance_speed(rounds: int, num: int = 3000) -> None:
    """A distance at 2,048 dimensions, with a spectrum like that of Inception features."""
    from pytorch_fid.fid_score import calculate_frechet_distance

    generator = torch.Generator().manual_seed(0)
    sets = []
    for shift in (0.0, 0.02):
        stats = FeatureStats()
        stats.update(torch.randn(num, 2048, generator=generator) * torch.logspace(0, -2, 2048) + shift)
        sets += [stats.mean, stats.cov]
    calls = {"scipy.linalg.sqrtm (pytorch-fid)": lambda: int(calculate_frechet_distance(*sets) > 0),
             "here": lambda: int(frechet_distance(*sets) > 0)}
    report("Frechet distance, 2,048 dimensions, cpu", alternate(calls, rounds, warm_up=0), baseline=next(iter(calls)),
           unit="1/s", precision="fp64")
    print()


def agreement(source, num: int, folder: Path, device: str) -> dict:
    """FID of ``num`` images against ``num`` others by both, in chunks taken in turn; then from a zip and an npz."""
    from pytorch_fid.fid_score import calculate_frechet_distance, get_activations

    net, theirs = load_inception(device=device), pytorch_fid_network(device=device)
    chosen = np.random.default_rng(0).permutation(len(source))[:2 * num]
    collectors, activations, seconds = [], [], {"pytorch-fid": [], "here": []}
    for half, indices in enumerate((chosen[:num], chosen[num:])):
        files = extract(source, indices, folder / str(half))
        images, collector, theirs_half = FileSource(folder / str(half)), Collector(net, keep_features=True), []
        for chunk in np.array_split(np.arange(num), max(1, num // 250)):
            names = [sorted(files)[i] for i in chunk]
            values, spent = timed(partial(get_activations, names, theirs, 50, 2048, device, num_workers=2))
            theirs_half.append(values)
            seconds["pytorch-fid"].append(spent / len(chunk))
            _, spent = timed(partial(evaluate_images, images, collector, 50, indices=chunk))
            seconds["here"].append(spent / len(chunk))
        collectors.append(collector)
        activations.append(np.concatenate(theirs_half))
        print(f"half {half}: " + json.dumps({name: 1 / median(values) for name, values in seconds.items()}), flush=True)
    theirs_stats = [value for each in activations for value in (each.mean(0), np.cov(each, rowvar=False))]
    ours_stats = [value for each in collectors for value in (each.stats.mean, each.stats.cov)]
    fid_theirs, seconds_theirs = timed(lambda: calculate_frechet_distance(*theirs_stats))
    fid_ours, seconds_ours = timed(lambda: frechet_distance(*ours_stats))
    own = torch.cat(collectors[0].features["pool"]).numpy()
    return {"fid_pytorch_fid": float(fid_theirs), "fid_here": fid_ours,
            "relative": abs(fid_theirs - fid_ours) / fid_theirs,
            "features_relative": float(np.linalg.norm(own - activations[0]) / np.linalg.norm(activations[0])),
            "images_per_s": {name: 1 / median(values) for name, values in seconds.items()},
            "distance_s": {"pytorch-fid": seconds_theirs, "here": seconds_ours},
            "same_pixels": _same_pixels(folder / "0", num)}


def _same_pixels(folder: Path, num: int) -> bool:
    """The folder, a zip and an npz of it give the network the same bytes, hence the same FID."""
    import shutil

    shutil.make_archive(str(folder), "zip", folder)
    of_folder = np.stack([FileSource(folder).reader.read(i) for i in range(num)])
    atomic_write(folder.with_suffix(".npz"), lambda file: np.savez(file, arr_0=of_folder))
    sources = [FileSource(folder.with_suffix(suffix)) for suffix in (".zip", ".npz")]
    return all((np.stack([source.reader.read(i) for i in range(num)]) == of_folder).all() for source in sources)


def main():
    parser = arguments(__doc__)
    parser.add_argument("--images", required=True)
    parser.add_argument("--num", type=int, default=100, help="images of the timing")
    parser.add_argument("--agree", type=int, default=0, metavar="N", help="also compare FIDs of N against N images")
    args = parser.parse_args()
    source = FileSource(args.images)
    with tempfile.TemporaryDirectory() as folder:
        if args.agree:
            found = agreement(source, args.agree, Path(folder), args.device)
            print(json.dumps(found, indent=1), flush=True)
            line = {"title": f"FID of {args.agree} against {args.agree}", "device": args.device, **found, **machine()}
            with open(RESULTS, "a") as file:
                file.write(json.dumps(line) + "\n")
        distance_speed(args.rounds)
        features_speed(source, args.num, args.rounds, Path(folder) / "speed", args.device)


if __name__ == "__main__":
    main()
