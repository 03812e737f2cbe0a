"""Mixup and CutMix blend pixels and labels by the same lambda, written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from shards import seeded_generator
from trainer.images.mixing import Mixing, draw_mixing, mix_images
from trainer.methods.method import Images
from trainer.methods.parts.losses import cross_entropy, distillation_kl, targets

SIDE = 16
BOTH = {"mixup": 0.4, "cutmix": 1.0}


def draw(batch: int = 64, *, seed: int = 0, **alphas: float) -> Mixing:
    mixing = draw_mixing(batch, SIDE, **{"mixup": 0.0, "cutmix": 0.0, **alphas}, generator=seeded_generator(seed))
    assert mixing is not None
    return mixing


def by_hand(weight: list[float], partner: list[int], box: list[list[int]] | None = None) -> Mixing:
    return Mixing(torch.tensor(partner), torch.tensor(weight), torch.tensor(box or [[0, 0, 0, 0]] * len(weight)))


def mixed_images(mixing: Mixing | None, labels: list[int]) -> Images:
    classes = torch.zeros(len(labels), 3)
    return Images(x=torch.zeros(len(labels), 3, 1, 1), labels=torch.tensor(labels), logits=classes, mixing=mixing)


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(v / temperature) for v in logits]
    return [p / sum(powers) for p in powers]


def test_mixup_of_images_is_the_weighted_mean() -> None:
    images = torch.rand(64, 3, SIDE, SIDE)
    mixing = draw(mixup=0.8)
    mixed = mix_images(images, mixing)
    for i, (weight, partner) in enumerate(zip(mixing.weight.tolist(), mixing.partner.tolist(), strict=True)):
        torch.testing.assert_close(mixed[i], weight * images[i] + (1 - weight) * images[partner])


def test_cutmix_pastes_one_window_whose_area_is_one_minus_lambda() -> None:
    """Images of one value each: every pixel is the image's own or its partner's; the partner's form a rectangle."""
    images = torch.arange(64.0).view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE)
    mixing = draw(cutmix=1.0)
    mixed = mix_images(images, mixing)
    for i, (weight, partner) in enumerate(zip(mixing.weight.tolist(), mixing.partner.tolist(), strict=True)):
        foreign = mixed[i, 0] != i
        if partner == i:
            assert not foreign.any()
            continue
        assert set(mixed[i].unique().tolist()) <= {float(i), float(partner)}
        assert weight == pytest.approx(1 - foreign.float().mean().item())
        rows, columns = foreign.any(1), foreign.any(0)
        assert torch.equal(foreign, rows[:, None] & columns[None, :])
    assert len(mixing.weight.unique()) > 30  # every image has a lambda of its own


def test_with_both_set_about_half_take_each() -> None:
    mixing = draw(4000, mixup=0.4, cutmix=1.0)
    cut = (mixing.box[:, 0] < mixing.box[:, 1]).float().mean().item()
    assert 0.4 < cut < 0.52  # a few CutMix windows are empty
    assert sorted(mixing.partner.tolist()) == list(range(4000))


def test_same_generator_same_mixing_and_nothing_global() -> None:
    torch.manual_seed(1)
    first = draw(**BOTH)
    torch.manual_seed(2)
    second = draw(**BOTH)
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))
    assert not torch.equal(first.partner, draw(seed=1, **BOTH).partner)


def test_without_alphas_nothing_is_mixed() -> None:
    assert draw_mixing(8, SIDE, mixup=0.0, cutmix=0.0, generator=seeded_generator(0)) is None


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_mixed_soft_labels_are_the_mixture_of_softened_probabilities(temperature: float) -> None:
    """KL to p = lambda softmax(z1 / T) + (1 - lambda) softmax(z2 / T), written out."""
    student = [[1.0, -0.5, 2.0], [0.3, 0.2, -1.0]]
    teacher = [[3.0, -2.0, 5.0], [4.0, 0.0, -3.0]]
    weights, partners = [0.7, 0.2], [1, 0]
    expected = 0.0
    for i, (weight, j) in enumerate(zip(weights, partners, strict=True)):
        own, other, q = (
            softmax(teacher[i], temperature),
            softmax(teacher[j], temperature),
            softmax(student[i], temperature),
        )
        p = [weight * a + (1 - weight) * b for a, b in zip(own, other, strict=True)]
        expected += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 2
    images = mixed_images(by_hand(weights, partners), [0, 0])
    term = distillation_kl(torch.tensor(student), torch.tensor(teacher), images, temperature)
    assert term.mean({"clean": 2}).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_hard_labels_are_the_mixture_of_smoothed_one_hots(smoothing: float) -> None:
    logits, labels, weights, partners = [[1.0, -0.5, 2.0], [0.3, 0.2, -1.0]], [2, 0], [0.7, 0.2], [1, 0]
    expected = 0.0
    for i, (weight, j) in enumerate(zip(weights, partners, strict=True)):
        for k, q in enumerate(softmax(logits[i])):
            own, other = ((1 - smoothing) * (labels[n] == k) + smoothing / 3 for n in (i, j))
            expected -= (weight * own + (1 - weight) * other) * math.log(q) / 2
    images = mixed_images(by_hand(weights, partners), labels)
    term = cross_entropy(torch.tensor(logits), images, smoothing)
    assert term.mean({"clean": 2}).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_lambda_zero_and_one_are_one_of_the_two(weight: float) -> None:
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    partner, labels = [1, 2, 3, 0], [0, 1, 2, 0]
    loss = distillation_kl(student, teacher, mixed_images(by_hand([weight] * 4, partner), labels), 4.0)
    alone = distillation_kl(student, teacher if weight else teacher[partner], mixed_images(None, labels), 4.0)
    torch.testing.assert_close(loss.values, alone.values)


def test_an_attack_on_mixed_images_aims_at_the_mixture_of_their_labels() -> None:
    mixing = by_hand([0.7, 0.2, 1.0], [1, 0, 2])
    expected = torch.tensor([[0.0, 0.3, 0.7], [0.0, 0.2, 0.8], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(targets(mixed_images(mixing, [2, 1, 0])), expected)
