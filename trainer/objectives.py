"""What a student minimizes: pure functions of logits. Paper eq. 9; temperature T = 4 and weight a = 0.5 are recipe fields."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Objective = Literal["plain", "kd", "dad"]
STREAMS: dict[str, tuple[Literal["clean", "dad"], ...]] = {"plain": ("clean",), "kd": ("clean",), "dad": ("clean", "dad")}


def distillation_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 * KL(teacher || student) at temperature T, mean over the batch (Hinton et al., 2015). Logits [B, classes] each.

    T^2 keeps the size of the gradient independent of T.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def plain_loss(student: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the labels [B] (class indices), mean over the batch."""
    return F.cross_entropy(student.float(), labels)


def kd_loss(student: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor, *, temperature: float, weight: float) -> torch.Tensor:
    """Paper eq. 7: CE(student(x), y) + a T^2 KL(teacher(x) || student(x); T)."""
    return plain_loss(student, labels) + weight * distillation_kl(student, teacher, temperature)


def dad_loss(
    student: torch.Tensor,
    labels: torch.Tensor,
    teacher: torch.Tensor,
    student_dad: torch.Tensor,
    teacher_dad: torch.Tensor,
    *,
    temperature: float,
    weight: float,
) -> torch.Tensor:
    """Paper eq. 9: `kd_loss` on clean images + a T^2 KL(teacher(x'') || student(x''); T) on DAD images. No labels on x''.

    The clean and the DAD half may have different sizes; each is averaged over its own.
    """
    clean = kd_loss(student, labels, teacher, temperature=temperature, weight=weight)
    return clean + weight * distillation_kl(student_dad, teacher_dad, temperature)
