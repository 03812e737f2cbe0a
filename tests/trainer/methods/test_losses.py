"""The losses equal the paper's formulas written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.methods.method import Images, Term, total
from trainer.methods.parts.losses import cross_entropy, distillation_kl, targets

STUDENT = [[1.0, -0.5, 2.0], [0.3, 0.2, -1.0]]
TEACHER = [[3.0, -2.0, 5.0], [4.0, 0.0, -3.0]]
LABELS = [2, 1]


def softmax(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(v / temperature) for v in logits]
    return [p / sum(powers) for p in powers]


def images(count: int = 2, stream: str = "clean") -> Images:
    labels, logits = torch.tensor(LABELS[:count]), torch.tensor(TEACHER[:count])
    return Images(x=torch.zeros(count, 3, 1, 1), labels=labels, logits=logits, stream=stream)  # type: ignore[arg-type]


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 1.36096), (4.0, 1.42235)])
def test_the_kl_divergence_sums_over_classes(temperature: float, expected: float) -> None:
    """Of s = (2, 0, 0) and t = (0, 2, 0). torch's reduction "mean" would give a third: 0.45365 for T = 1."""
    one = Images(x=torch.zeros(1, 3, 1, 1), labels=torch.zeros(1, dtype=torch.long), logits=torch.zeros(1, 3))
    term = distillation_kl(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0]]), one, temperature)
    assert term.values.tolist() == pytest.approx([expected], rel=1e-5)
    assert term.mean({"clean": 1}).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0])
def test_the_kl_divergence_is_that_of_teacher_to_student(temperature: float) -> None:
    """T^2 sum p log(p / q), p the teacher's: sample by sample."""
    expected = []
    for t, s in zip(TEACHER, STUDENT, strict=True):
        p, q = softmax(t, temperature), softmax(s, temperature)
        expected.append(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    term = distillation_kl(torch.tensor(STUDENT), torch.tensor(TEACHER), images(), temperature)
    assert term.values.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_spreads_the_smoothed_share_over_all_classes(smoothing: float) -> None:
    expected = [
        -sum(((1 - smoothing) * (k == y) + smoothing / 3) * math.log(q) for k, q in enumerate(softmax(s, 1.0)))
        for s, y in zip(STUDENT, LABELS, strict=True)
    ]
    assert cross_entropy(torch.tensor(STUDENT), images(), smoothing).values.tolist() == pytest.approx(expected)


def test_a_part_of_the_images_has_its_own_labels() -> None:
    whole = cross_entropy(torch.tensor(STUDENT), images()).values
    part = cross_entropy(torch.tensor(STUDENT[1:]), images(), part=slice(1, None)).values
    assert torch.equal(part, whole[1:])


def test_the_loss_is_the_weighted_sum_of_means_over_each_stream() -> None:
    """Each term is divided by the samples of its own stream in the global batch, not by those that are here."""
    terms = {
        "ce": Term(torch.tensor([1.0, 2.0]), "clean"),
        "kl_dad": 0.5 * Term(torch.tensor([6.0]), "dad"),
    }
    assert total(terms, {"clean": 4, "dad": 3}).item() == pytest.approx(3 / 4 + 0.5 * 6 / 3)
    assert (2.0 * (0.5 * terms["kl_dad"])).weight == 0.5


def test_the_gradient_vanishes_where_student_and_teacher_agree() -> None:
    """Eq. 9 has no cross-entropy on x'': nothing pulls there towards the label, be the teacher right or wrong."""
    agreed = torch.tensor(TEACHER[:1], requires_grad=True)
    term = distillation_kl(agreed, torch.tensor(TEACHER[:1]), images(1, "dad"), 4.0)
    (gradient,) = torch.autograd.grad(term.mean({"dad": 1}), agreed)
    assert gradient.abs().max() < 1e-6


def test_float16_teacher_logits_are_softened_in_float32() -> None:
    teacher, student = torch.tensor([[60.0, -60.0, 30.0]]), torch.zeros(1, 3)
    exact, stored = (distillation_kl(student, logits, images(1), 4.0).values for logits in (teacher, teacher.half()))
    assert stored.item() == pytest.approx(exact.item(), rel=1e-6)


def test_attacks_climb_away_from_the_labels() -> None:
    assert torch.equal(targets(images()), torch.tensor(LABELS))
