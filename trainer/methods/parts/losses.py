"""Losses, the building blocks of methods: pure functions from logits to one value per sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...images.mixing import mix_log_probabilities
from .terms import Images, Term

ALL = slice(None)


def cross_entropy(output: torch.Tensor, images: Images, smoothing: float = 0.0, part: slice = ALL) -> Term:
    """Cross-entropy of logits [B, classes] with the labels; for mixed images lambda CE(y1) + (1 - lambda) CE(y2).

    smoothing: share of the label that is spread over all classes. part: images of the stream that have logits.
    """

    def each(labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output.float(), labels[part], label_smoothing=smoothing, reduction="none")

    mixing = images.mixing
    if mixing is None:
        return Term(each(images.labels), images.stream)
    weight, other = mixing.weight[part], images.labels[mixing.partner]
    return Term(weight * each(images.labels) + (1 - weight) * each(other), images.stream)


def distillation_kl(output: torch.Tensor, teacher: torch.Tensor, images: Images, temperature: float) -> Term:
    """T^2 * KL(teacher || student) at temperature T (Hinton et al., 2015) of logits [B, classes].

    T^2 makes the size of the gradient independent of T. For mixed images, the teacher's distribution is
    lambda softmax(z1 / T) + (1 - lambda) softmax(z2 / T). The KL sums over classes; torch's reduction "mean" would
    divide by their number.
    """
    log_student = F.log_softmax(output.float() / temperature, dim=1)
    log_teacher = mix_log_probabilities(F.log_softmax(teacher.float() / temperature, dim=1), images.mixing)
    each = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)
    return Term(temperature**2 * each, images.stream)


def targets(images: Images) -> torch.Tensor:
    """Targets of an attack: labels int64 [B], or distributions over classes float32 [B, classes] for mixed images."""
    if images.mixing is None:
        return images.labels
    weight = images.mixing.weight[:, None]
    own = F.one_hot(images.labels, images.logits.shape[1])
    return weight * own + (1 - weight) * own[images.mixing.partner]


def partner_logits(images: Images) -> torch.Tensor:
    """The teacher's logits [B, classes] on the clean images with the same keys. The method sets `Needs.partners`."""
    assert images.partner is not None, f"the reader brought no partners of the {images.stream} stream"
    return images.partner
