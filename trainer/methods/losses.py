"""What a student minimizes: pure functions of logits. Paper eq. 9; temperature T = 4 and weight a = 0.5 are recipe fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from ..images.mixing import Mixing, mix_log_probabilities

Objective = Literal["plain", "kd", "dad"]
STREAMS: dict[Objective, tuple[Literal["clean", "dad"], ...]] = {
    "plain": ("clean",),
    "kd": ("clean",),
    "dad": ("clean", "dad"),
}


def distillation_kl(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, mixing: Mixing | None = None
) -> torch.Tensor:
    """T^2 * KL(teacher || student) at temperature T, mean over the batch (Hinton et al., 2015). Logits [B, classes] each.

    T^2 keeps the size of the gradient independent of T. For mixed images the teacher's distribution is the mixture of its two
    softened ones, lambda softmax(z1 / T) + (1 - lambda) softmax(z2 / T).
    """
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    log_teacher = mix_log_probabilities(F.log_softmax(teacher.float() / temperature, dim=1), mixing)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def plain_loss(
    student: torch.Tensor, labels: torch.Tensor, *, smoothing: float = 0.0, mixing: Mixing | None = None
) -> torch.Tensor:
    """Cross-entropy of logits [B, classes] with the labels [B] (class indices), mean over the batch.

    smoothing: share of the label that is spread over all classes. For mixed images lambda CE(y1) + (1 - lambda) CE(y2).
    """
    if mixing is None:
        return F.cross_entropy(student.float(), labels, label_smoothing=smoothing)
    own, other = (
        F.cross_entropy(student.float(), target, label_smoothing=smoothing, reduction="none")
        for target in (labels, labels[mixing.partner])
    )
    return (mixing.weight * own + (1 - mixing.weight) * other).mean()


def student_loss(
    objective: Objective,
    labels: torch.Tensor,
    outputs: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    *,
    temperature: float,
    weight: float,
    smoothing: float = 0.0,
    mixing: Sequence[Mixing | None] = (None, None),
    shares: Sequence[float] = (1.0, 1.0),
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of an objective and its terms.

    outputs, teacher: logits [B, classes] of the student and the teacher, on the clean images and, for dad, on the DAD images after
    them; the two may differ in B, each term is averaged over its own. labels: [B] of the clean images. mixing: how each of the two was
    mixed. shares: which part of the global batch each of the two is, so that the losses of all parts add up to that of the whole.

    - plain: CE(student(x), y)
    - kd (paper eq. 7): + a T^2 KL(teacher(x) || student(x); T)
    - dad (paper eq. 9): + a T^2 KL(teacher(x'') || student(x''); T). No labels on x''.
    """
    terms = {"ce": shares[0] * plain_loss(outputs[0], labels, smoothing=smoothing, mixing=mixing[0])}
    if objective != "plain":
        terms["kl_clean"] = shares[0] * distillation_kl(outputs[0], teacher[0], temperature, mixing[0])
    if objective == "dad":
        terms["kl_dad"] = shares[1] * distillation_kl(outputs[1], teacher[1], temperature, mixing[1])
    loss = terms["ce"]
    for name in ("kl_clean", "kl_dad"):
        if name in terms:
            loss = loss + weight * terms[name]
    return loss, terms
