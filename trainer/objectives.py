"""What a student minimizes: pure functions of logits. Paper eq. 9; temperature T = 4 and weight a = 0.5 are recipe fields."""

from __future__ import annotations

from collections.abc import Sequence
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


def student_loss(
    objective: Objective,
    labels: torch.Tensor,
    outputs: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    *,
    temperature: float,
    weight: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of an objective and its terms.

    outputs, teacher: logits [B, classes] of the student and the teacher, on the clean images and, for dad, on the DAD images after
    them; the two may differ in B, each term is averaged over its own. labels: [B] of the clean images.

    - plain: CE(student(x), y)
    - kd (paper eq. 7): + a T^2 KL(teacher(x) || student(x); T)
    - dad (paper eq. 9): + a T^2 KL(teacher(x'') || student(x''); T). No labels on x''.
    """
    terms = {"ce": plain_loss(outputs[0], labels)}
    if objective != "plain":
        terms["kl_clean"] = distillation_kl(outputs[0], teacher[0], temperature)
    if objective == "dad":
        terms["kl_dad"] = distillation_kl(outputs[1], teacher[1], temperature)
    loss = terms["ce"]
    for name in ("kl_clean", "kl_dad"):
        if name in terms:
            loss = loss + weight * terms[name]
    return loss, terms
