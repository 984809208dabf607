import torch

from functions.pixels import random_flip


def test_flip_mirrors_half_of_the_images_left_to_right():
    images = torch.arange(6, dtype=torch.uint8).view(1, 1, 2, 3).expand(1000, 1, 2, 3)
    flipped = random_flip(images, torch.Generator().manual_seed(0))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    untouched = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ untouched).all() and 400 < mirrored.sum() < 600
