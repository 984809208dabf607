"""Windows of images for text-to-image training, and what SDXL is told about them.

    time_ids = (original height, width, crop top, left, target height, width)        (2307.01952, section 2.2)

The crop is counted in pixels of the resized image, whose shorter side fits the target. Of a mirror image, left is
counted from the other side: where the window begins in the mirrored whole.
"""

import numpy as np

from datasets.images import RESAMPLE, resize


def crops(pixels: np.ndarray, size: tuple[int, int], count: int, random_crop: bool, mirrored: bool,
          seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The variants of an image.

    Args:
        pixels: uint8, (H, W, C).
        size: (height, width) of the windows.
        count: Crops; the first is from the middle unless ``random_crop``.
        random_crop: Draw the place of each.
        mirrored: Add the mirror image of each.
        seed: Of those draws; (run's seed, image).

    Returns:
        uint8 (V, height, width, C) and float32 (V, 6), V = count, twice that with ``mirrored``.
    """
    (height, width), (h, w) = size, pixels.shape[:2]
    fitted = (height, max(width, round(height * w / h))) if h * width <= w * height else (
        max(height, round(width * h / w)), width)
    whole = resize(pixels, fitted, "", RESAMPLE["bilinear"])
    spare = fitted[0] - height, fitted[1] - width
    draw = np.random.RandomState(np.random.SeedSequence(seed).generate_state(4))
    windows, ids = [], []
    for _ in range(count):
        top, left = (draw.randint(0, room + 1) if random_crop else room // 2 for room in spare)
        window = whole[top:top + height, left:left + width]
        windows.append(window)
        ids.append((h, w, top, left, height, width))
        if mirrored:
            windows.append(window[:, ::-1])
            ids.append((h, w, top, spare[1] - left, height, width))
    return np.stack(windows), np.array(ids, np.float32)
