"""Adversarial training."""

from __future__ import annotations

import torch
from torch import nn

from .attacks import adversarial_images
from .losses import plain_loss


def adversarial_training_loss(
    student: nn.Module, x: torch.Tensor, y: torch.Tensor, generator: torch.Generator, *, steps: int = 10
) -> torch.Tensor:
    """AT (Madry et al., 2018): CE on PGD images alone. ``steps`` attack passes and 1 training pass; the paper counts AT-10 as 11."""
    adversarial = adversarial_images(student, x, y, generator, steps=steps, eps=4 / 255, alpha=1 / 255)
    return plain_loss(student(adversarial), y)
