"""The classifier of handwritten digits and what is measured with it."""


import pytest
import torch

from models import digit_classifier
from models.digit_classifier import DigitClassifier, load_digit_classifier
from runners.evaluation.digits import real_digits, split, train
from runners.evaluation.metrics import (
    Evaluation,
)
from tests.tiny_net import images_of, pixels, reference_of
from utils.errors import DataError, UserError


def test_real_digits_are_near_themselves_and_torn_ones_far(net):
    """The study's question on 16x16 pictures, in grey and in RGB: halves of the real ones, noise, shuffled patches."""
    real, labels = real_digits([16, 16])
    found = {}
    for name, made in (("half", real[::2].expand(-1, 3, -1, -1)), ("torn", tear(real[::8].float(), 4).byte()),
                       ("noise", images_of(pixels(64))[:, :1])):
        measured, before = Evaluation(reference_of(pixels(30), net), net, ("digits_fd", "digits_unsure")), net.images
        measured.update(made, range(len(made)))
        found[name] = measured.results()
        assert net.images == before                                      # no pass that no metric asks for
    assert found["half"]["digits_fd"] < 1 and found["half"]["digits_unsure"] < 0.02
    assert found["torn"]["digits_fd"] > 50 and found["torn"]["digits_unsure"] > 0.5
    assert found["noise"]["digits_fd"] > 50 and found["noise"]["digits_unsure"] > 0.9
    other = reference_of(pixels(30), net, provenance={"dataset": "CIFAR10"})
    with pytest.raises(UserError, match="for data.dataset DIGITS; reference reference is of CIFAR10"):
        Evaluation(other, net, ("digits_fd",))


def tear(images, side):
    """Quarters of each picture in another order."""
    size = images.shape[-1] // 2
    rows = torch.cat([images[..., size:, :], images[..., :size, :]], -2)
    return torch.cat([rows[..., :size].flip(-1), rows[..., size:].flip(-2)], -1)


def test_the_shipped_classifier_knows_digits_it_was_not_trained_on():
    images, labels = real_digits([8, 8])
    kept, held_out = split(len(images))
    assert len(held_out) == 360 and not set(kept.tolist()) & set(held_out.tolist())
    classifier = load_digit_classifier()
    probabilities = classifier.probabilities(classifier(images[held_out]))
    assert (probabilities.argmax(1) == labels[held_out]).double().mean() > 0.99
    assert digit_classifier.WEIGHTS.stat().st_size < 200_000


def test_the_recipe_of_the_classifier_is_deterministic_and_learns():
    """All of it takes half a minute; its first steps here."""
    torch.rand(3)                                                        # global draws must not matter
    first, second = train(steps=60), train(steps=60)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    images, labels = real_digits([8, 8])
    classifier = DigitClassifier(first)
    assert (classifier.probabilities(classifier(images)).argmax(1) == labels).double().mean() > 0.8


def test_a_damaged_classifier_is_one_line(tmp_path):
    for content in (b"", b"not safetensors at all", digit_classifier.WEIGHTS.read_bytes()[:1000]):
        (tmp_path / "weights").write_bytes(content)
        with pytest.raises(DataError, match="weights: not the classifier of digits"):
            load_digit_classifier(weights=tmp_path / "weights")
