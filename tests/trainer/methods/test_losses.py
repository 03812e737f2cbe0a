"""The losses equal the paper's formulas written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.methods.losses import distillation_kl, plain_loss, student_loss


def _softmax(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(v / temperature) for v in logits]
    return [p / sum(powers) for p in powers]


def _kl(teacher: list[list[float]], student: list[list[float]], temperature: float) -> float:
    total = 0.0
    for t, s in zip(teacher, student, strict=True):
        p, q = _softmax(t, temperature), _softmax(s, temperature)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(teacher)


def _ce(student: list[list[float]], labels: list[int]) -> float:
    return sum(-math.log(_softmax(s, 1.0)[y]) for s, y in zip(student, labels, strict=True)) / len(labels)


STUDENT = [[1.0, -0.5, 2.0], [0.3, 0.2, -1.0]]
TEACHER = [[3.0, -2.0, 5.0], [4.0, 0.0, -3.0]]
STUDENT_DAD = [[0.5, 0.1, 0.2]]
TEACHER_DAD = [[-1.0, 6.0, 2.0]]
LABELS = [2, 1]


@pytest.mark.parametrize(("temperature", "weight"), [(4.0, 0.5), (1.0, 1.0), (2.5, 0.1)])
def test_dad_loss_is_equation_9(temperature: float, weight: float) -> None:
    expected = (
        _ce(STUDENT, LABELS)
        + weight * temperature**2 * _kl(TEACHER, STUDENT, temperature)
        + weight * temperature**2 * _kl(TEACHER_DAD, STUDENT_DAD, temperature)
    )
    student, teacher = ([torch.tensor(v) for v in pair] for pair in ((STUDENT, STUDENT_DAD), (TEACHER, TEACHER_DAD)))
    loss, terms = student_loss("dad", torch.tensor(LABELS), student, teacher, temperature=temperature, weight=weight)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert list(terms) == ["ce", "kl_clean", "kl_dad"]


def test_kd_loss_is_equation_7() -> None:
    expected = _ce(STUDENT, LABELS) + 0.5 * 16 * _kl(TEACHER, STUDENT, 4.0)
    logits = [torch.tensor(STUDENT)], [torch.tensor(TEACHER)]
    loss, _ = student_loss("kd", torch.tensor(LABELS), *logits, temperature=4.0, weight=0.5)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_no_label_acts_on_dad_images() -> None:
    """Eq. 9 has no cross-entropy on x'': the gradient there vanishes when the student agrees with the teacher, right or wrong."""
    agreed = torch.tensor(TEACHER_DAD, requires_grad=True)
    teacher = [torch.tensor(TEACHER), torch.tensor(TEACHER_DAD)]
    loss, _ = student_loss(
        "dad", torch.tensor(LABELS), [torch.tensor(STUDENT), agreed], teacher, temperature=4.0, weight=0.5
    )
    (gradient,) = torch.autograd.grad(loss, agreed)
    assert gradient.abs().max() < 1e-6


def test_float16_teacher_logits_are_softened_in_float32() -> None:
    teacher = torch.tensor([[60.0, -60.0, 30.0]])
    exact = distillation_kl(torch.tensor([[0.0, 0.0, 0.0]]), teacher, 4.0)
    stored = distillation_kl(torch.tensor([[0.0, 0.0, 0.0]]), teacher.half(), 4.0)
    assert float(stored) == pytest.approx(float(exact), rel=1e-6)


def test_plain_loss_ignores_the_teacher() -> None:
    alone = plain_loss(torch.tensor(STUDENT), torch.tensor(LABELS))
    loss, _ = student_loss(
        "plain", torch.tensor(LABELS), [torch.tensor(STUDENT)], [torch.tensor(TEACHER)], temperature=4.0, weight=0.5
    )
    assert float(loss) == float(alone) == pytest.approx(_ce(STUDENT, LABELS), rel=1e-6)
