"""The augmentation pipe against the published one with its draws replayed, and what it promises beside."""

import pytest
import torch

from functions.augment import LABEL_DIM, MULTIPLIERS, Draws, augment
from tests.edm_cases import cases


class Replay:
    """Draws of a golden case, in order, each asked for in its shape."""

    def __init__(self, draws):
        self.left = list(draws)

    def _next(self, op, shape):
        draw = self.left.pop(0)
        assert (draw["op"], tuple(draw["shape"])) == (op, shape)
        return draw["value"]

    def normal(self, *shape):
        return self._next("randn", shape)

    def uniform(self, *shape):
        return self._next("rand", shape)

    def coin(self, *shape):
        return self._next("randint", shape)


# Left out: the transformations that train.py never switches on.
CASES = [p for p in cases("loss", "augment") if p.values[0]["augment_kwargs"].keys() <= {"p", *MULTIPLIERS}]


@pytest.mark.parametrize("case", CASES)
def test_images_and_labels_are_published(case):
    multipliers = {name: value for name, value in case["augment_kwargs"].items() if name != "p"}
    replay = Replay(case["draws"])
    images, labels = augment(case["images"], case["augment_kwargs"]["p"], replay, multipliers)
    assert not replay.left
    assert (images - case["out"]).abs().max() < 1e-4
    assert torch.allclose(labels, case["labels"], atol=1e-6)


def draws(seed=0):
    return Draws(torch.Generator().manual_seed(seed))


def test_the_same_stream_gives_the_same_images_and_shapes_never_vary():
    images = torch.rand(4, 3, 12, 16) * 2 - 1
    first, second = augment(images, 0.5, draws()), augment(images, 0.5, draws())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], augment(images, 0.5, draws(1))[0])
    assert first[0].shape == images.shape and first[1].shape == (4, LABEL_DIM) and first[1].dtype == torch.float32


def test_an_image_does_not_depend_on_its_batch():
    class Fixed(Draws):
        def __init__(self, rows):
            super().__init__(torch.Generator().manual_seed(3))
            self.rows = rows

        def _cut(self, drawn, shape):                          # draw for 6 images, keep those of the batch
            return drawn[..., self.rows] if len(shape) <= 2 else drawn[self.rows]

        def normal(self, *shape):
            return self._cut(super().normal(*shape[:-1], 6), shape)

        def uniform(self, *shape):
            return self._cut(super().uniform(*((6, *shape[1:]) if len(shape) == 4 else (*shape[:-1], 6))), shape)

        def coin(self, *shape):
            return self._cut(super().coin(6, *shape[1:]), shape)

    images = torch.rand(6, 3, 8, 8)
    whole, _ = augment(images, 1.0, Fixed(slice(0, 6)))
    part, _ = augment(images[2:5], 1.0, Fixed(slice(2, 5)))
    assert torch.allclose(whole[2:5], part, atol=1e-6)


def test_probability_zero_gives_back_the_images_and_xflip_is_certain_above():
    images = torch.rand(200, 1, 8, 8)
    out, labels = augment(images, 0.0, draws())
    assert (out - images).abs().max() < 1e-5 and not labels.any()
    _, labels = augment(images, 1e-6, draws())
    assert 70 < labels[:, 0].sum() < 130 and not labels[:, 1:].any()


def test_a_translation_by_whole_pixels_moves_pixels_and_mirrors_the_border():
    class Half(Draws):                                         # w_x = 1: one eighth of 8 pixels to the right
        def normal(self, *shape):
            return torch.tensor([[1.0], [0.0]])

    images = torch.rand(1, 1, 8, 8)
    out, labels = augment(images, 1.0, Half(torch.Generator()), {"translate_frac": 1.0})
    assert labels.tolist() == [[1.0, 0.0]]
    expected = torch.cat([images[..., 1:2], images[..., :-1]], dim=3)       # reflected, without repeating the border
    assert (out - expected).abs().max() < 1e-5
