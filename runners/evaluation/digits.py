"""How good generated digits are, by a classifier of digits: a Frechet distance in its features, and the share of
pictures that it can make nothing of. ``python -m runners.evaluation.digits`` trains that classifier."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.arrays import digits as read_digits
from datasets.images import transform
from datasets.specs import DATASETS
from functions.frechet import FeatureStats, frechet_distance
from models.digit_classifier import FEATURES, WEIGHTS, DigitClassifier, DigitNet, load_digit_classifier, shrink
from utils.atomic import atomic_write
from utils.errors import UserError

THRESHOLD = 0.7              # a class wins when its probability is at least this
HELD_OUT = 360               # of the 1,797 digits, which training does not see
STEPS, BATCH, RATE, SEED = 3000, 128, 2e-3, 0


# ---- the metrics

def require_digits(reference, net) -> None:
    """UserError where the reference is known to be of something else."""
    found = reference.provenance.get("dataset", "DIGITS")
    if found != "DIGITS":
        raise UserError(f"digits_fd and digits_unsure are for data.dataset DIGITS; reference {reference.name} is of "
                        f"{found}")


def digits_distance(measured, reference, evaluation) -> dict:
    """Against all real digits, brought to the images' size by the training transform first."""
    collector = evaluation.collector
    real = FeatureStats(FEATURES)
    real.update(collector.digits(real_digits(collector.image_size)[0]))
    stats = measured["digits"].stats
    return {"digits_fd": frechet_distance(real.mean, real.cov, stats.mean, stats.cov)}


def digits_unsure(measured, reference, evaluation) -> dict:
    """Share of images whose most probable class has less than ``THRESHOLD``."""
    features = torch.from_numpy(measured["digits"].features)
    best = evaluation.collector.digits.probabilities(features).amax(1)
    return {"digits_unsure": float((best < THRESHOLD).double().mean())}


def real_digits(image_size: list[int]) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as training sees them at this [height, width]: uint8 (1797, 1, H, W), labels (1797,)."""
    spec = DATASETS["DIGITS"]
    pixels, labels = read_digits(spec.bundled())
    resized = [transform(image, tuple(image_size), spec.transform, "digit") for image in pixels]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2), torch.as_tensor(labels, dtype=torch.long)


# ---- the recipe

def split(count: int) -> tuple[Tensor, Tensor]:
    """Indices of training and held-out digits."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED))
    return order[HELD_OUT:], order[:HELD_OUT]


def train(steps: int = STEPS) -> DigitNet:
    """Cross-entropy on distorted digits, and on pictures that are none, whose answer is "any class alike".

    Adam, batches of 128, rate 2e-3 falling to 0 by a half cosine, fp32; every draw from one seed. Half of each batch
    are digits (shifted, turned, stretched, blurred by a detour over 16x16, a little noise) with their labels; a quarter
    are blends of two digits with both labels; a quarter are torn digits (patches of 2x2 or 4x4 shuffled) and plain
    noise. Without the latter a classifier is sure of any picture.
    """
    generator = torch.Generator().manual_seed(SEED)
    images, labels = real_digits([8, 8])
    kept, _ = split(len(images))
    images, labels = shrink(images[kept]), F.one_hot(labels[kept], 10).float()          # (N, 1, 8, 8), (N, 10)
    network = initialise(DigitNet(), generator)
    optimizer = torch.optim.Adam(network.parameters(), weight_decay=1e-5)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        x, target = batch(images, labels, generator)
        loss = F.cross_entropy(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def initialise(network: DigitNet, generator: torch.Generator) -> DigitNet:
    """Weights N(0, 2/fan_in) (He et al. 2015), biases 0."""
    for value in network.parameters():
        with torch.no_grad():
            value.zero_()
            if value.ndim > 1:
                value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
    return network


def batch(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(128, 1, 8, 8) in [0, 1] and class probabilities (128, 10)."""
    def draw(count):
        chosen = torch.randint(len(images), (count,), generator=generator)
        return distort(images[chosen], generator), labels[chosen]

    half, quarter, eighth = BATCH // 2, BATCH // 4, BATCH // 8
    (plain, plain_labels), (first, first_labels), (second, second_labels) = draw(half), draw(quarter), draw(quarter)
    share = 0.3 + 0.4 * torch.rand(quarter, 1, generator=generator)
    blend = share[..., None, None] * first + (1 - share[..., None, None]) * second
    torn = tear(draw(eighth)[0], generator)
    noise = torch.rand(eighth, 1, 8, 8, generator=generator) ** (2 * torch.rand(eighth, 1, 1, 1, generator=generator))
    targets = [plain_labels, share * first_labels + (1 - share) * second_labels, torch.full((quarter, 10), 0.1)]
    return torch.cat([plain, blend, torn, noise]), torch.cat(targets)


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 10 degrees, stretch by up to 10%, shift by up to half a pixel; blur every other; noise of 0.05."""
    count = len(images)
    turn, wide, high, right, down = (2 * torch.rand(5, count, generator=generator) - 1) \
        * torch.tensor([[math.pi / 18], [0.1], [0.1], [0.125], [0.125]])
    rows = [torch.stack([turn.cos() * (1 + wide), -turn.sin(), right], 1),
            torch.stack([turn.sin(), turn.cos() * (1 + high), down], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), (count, 1, 8, 8), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    moved[::2] = F.avg_pool2d(F.interpolate(moved[::2], scale_factor=2, mode="bilinear", align_corners=False), 2)
    return (moved + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def tear(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shuffle the patches of each picture, of 2x2 in every other and of 4x4 in the rest."""
    torn = images.clone()
    for start, side in ((0, 2), (1, 4)):
        patches = F.unfold(images[start::2], side, stride=side)                        # (n, side^2, (8/side)^2)
        order = torch.rand(len(patches), 1, patches.shape[2], generator=generator).argsort(2)
        torn[start::2] = F.fold(patches.gather(2, order.expand_as(patches)), (8, 8), side, stride=side)
    return torn


def report(classifier: DigitClassifier) -> dict[str, float]:
    """What docs/fid.md says of the classifier: accuracy, unsure shares, distances, of digits and worse pictures."""
    found, generator = {}, torch.Generator().manual_seed(SEED)
    for side in (8, 16):
        images, labels = real_digits([side, side])
        kept, held_out = split(len(images))
        features = classifier(images)
        probabilities = classifier.probabilities(features)
        right, unsure = probabilities.argmax(1) == labels, probabilities.amax(1) < THRESHOLD
        small = shrink(images[held_out])
        blends = (small + small[torch.randperm(HELD_OUT, generator=generator)]) / 2
        pictures = {"blends of two": blends, "torn": tear(small, generator),
                    "blurred": F.avg_pool2d(small, 3, 1, 1),
                    "noise of 0.2": (small + 0.2 * torch.randn(small.shape, generator=generator)).clamp(0, 1),
                    "plain noise": torch.rand(small.shape, generator=generator)}
        whole, part = FeatureStats(FEATURES), FeatureStats(FEATURES)
        whole.update(features)
        part.update(features[held_out])
        found |= {f"{side}: accuracy on held-out": float(right[held_out].double().mean()),
                  f"{side}: accuracy on training": float(right[kept].double().mean()),
                  f"{side}: unsure of held-out": float(unsure[held_out].double().mean()),
                  f"{side}: distance of held-out": frechet_distance(whole.mean, whole.cov, part.mean, part.cov)}
        for name, values in pictures.items():
            made, stats = classifier((values * 255).round().byte()), FeatureStats(FEATURES)
            stats.update(made)
            doubtful = classifier.probabilities(made).amax(1) < THRESHOLD
            found |= {f"{side}: unsure of {name}": float(doubtful.double().mean()),
                      f"{side}: distance of {name}": frechet_distance(whole.mean, whole.cov, stats.mean, stats.cov)}
    return found


def save(network: DigitNet, path: Path = WEIGHTS) -> None:
    from safetensors.torch import save as to_bytes

    content = to_bytes({name: value.contiguous() for name, value in network.state_dict().items()})
    atomic_write(path, lambda file: file.write(content))


if __name__ == "__main__":
    torch.set_num_threads(1)
    save(train())
    for label, value in report(load_digit_classifier()).items():
        print(f"{label:32} {value:.4f}")
