"""AdvProp and Fast AdvProp."""

from __future__ import annotations

import torch
from torch import nn

from .attacks import adversarial_images
from .losses import plain_loss


def advprop_loss(
    student: nn.Module,
    auxiliary: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    generator: torch.Generator,
    *,
    steps: int = 5,
) -> torch.Tensor:
    """AdvProp (Xie et al., 2020): CE on every clean image, and CE on its PGD image through auxiliary batch norms.

    ``steps`` attack passes and 2 training passes; the paper counts AdvProp-5 as 7, and Fast AdvProp as this with one step, 3.
    auxiliary: from `with_auxiliary_norms`.
    """
    adversarial = adversarial_images(auxiliary, x, y, generator, steps=steps, eps=4 / 255, alpha=1 / 255)
    return plain_loss(student(x), y) + plain_loss(auxiliary(adversarial), y)


def fast_advprop_loss(
    student: nn.Module,
    auxiliary: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    generator: torch.Generator,
    *,
    share: float = 0.2,
) -> torch.Tensor:
    """Fast AdvProp (Mei et al., 2022), decoupled: one part of the batch is trained on clean, the other on one-step attacks only.

    share: of the attacked part; 4 to 1 in the published configuration, which also takes eps = alpha = 1/255. 1 training pass, and
    ``share`` attack passes. (The published code adds the weights' gradient of the attack pass to the update; left out here.)
    """
    attacked = max(1, round(share * len(x)))
    adversarial = adversarial_images(
        auxiliary, x[:attacked], y[:attacked], generator, steps=1, eps=1 / 255, alpha=1 / 255
    )
    clean_loss = plain_loss(student(x[attacked:]), y[attacked:])
    adversarial_loss = plain_loss(auxiliary(adversarial), y[:attacked])
    return (1 - attacked / len(x)) * clean_loss + attacked / len(x) * adversarial_loss
