"""DAT."""

from __future__ import annotations

import torch
from torch import nn

from .attacks import Quantizer, adversarial_images
from .losses import plain_loss


def dat_loss(
    student: nn.Module,
    discretizer: Quantizer,
    x: torch.Tensor,
    y: torch.Tensor,
    generator: torch.Generator,
    *,
    steps: int = 1,
    eps: float = 0.1,
    alpha: float = 0.1,
) -> torch.Tensor:
    """DAT (Mao et al., 2022): CE(x) + CE(x''), x'' discretized and adversarial to the student itself.

    ``steps`` attack passes, 2 passes of the discretizer and 2 training passes; the paper counts DAT-1 as 3.5.
    """
    adversarial = adversarial_images(
        student,
        x,
        y,
        generator,
        steps=steps,
        eps=eps,
        alpha=alpha,
        norm="l2",
        random_start=0.8,
        discretizer=discretizer,
    )
    return plain_loss(student(x), y) + plain_loss(student(adversarial), y)
