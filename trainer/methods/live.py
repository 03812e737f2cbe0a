"""Schemes that ask their teacher in every step."""

from __future__ import annotations

import torch
from torch import nn

from .attacks import Teacher
from .losses import student_loss


def live_kd_loss(
    student: nn.Module, teacher: Teacher, x: torch.Tensor, y: torch.Tensor, *, temperature: float, weight: float
) -> torch.Tensor:
    """KD (paper eq. 7) with the teacher asked in every step: 1 training pass and 1 forward pass of the teacher."""
    with torch.no_grad():
        logits = teacher(x)
    return student_loss("kd", y, [student(x)], [logits], temperature=temperature, weight=weight)[0]


def live_dad_loss(
    student: nn.Module,
    teacher: Teacher,
    x: torch.Tensor,
    y: torch.Tensor,
    dad: torch.Tensor,
    *,
    temperature: float,
    weight: float,
) -> torch.Tensor:
    """DAD (eq. 9) as the authors' code trains it: stored images, but the teacher asked about both halves in every step.

    With v DAD images ``dad`` for each clean one: 1 + v training passes and 1 + v forward passes of the teacher.
    """
    images = torch.cat([x, dad])
    with torch.no_grad():
        teacher_logits = teacher(images).split([len(x), len(dad)])
    outputs = student(images).split([len(x), len(dad)])
    return student_loss("dad", y, outputs, teacher_logits, temperature=temperature, weight=weight)[0]
