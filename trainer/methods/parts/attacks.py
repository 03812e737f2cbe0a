"""Adversarial images of the student in training: stage 1's attack, with the student in the teacher's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .norms import through

DAT_START = 0.8  # published probability of a random start
Quantizer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # images -> (images, codes)


def no_discretizer(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A discretizer that leaves images as they are."""
    return images, images.new_empty(0)


def adversarial_images(
    student: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    generator: torch.Generator,
    *,
    steps: int,
    eps: float,
    alpha: float,
    norm: str = "linf",
    random_start: float = 1.0,
    discretizer: Quantizer = no_discretizer,
    norms: int = 0,
    training: bool = False,
) -> torch.Tensor:
    """Attack the student with ``steps`` attack passes. Returns images [B, 3, H, W] in [0, 1].

    x: images [B, 3, H, W] in [0, 1]. y: labels [B], or distributions over classes [B, classes] for mixed images.
    eps, alpha: radius and step, in units of pixel values. random_start: probability of starting at a random point of
    the ball (Linf) or sphere (L2). norms: number of the set of batch norms to use.
    training: attack in train mode, so that batch norm's running statistics follow the images on the way; else in eval
    mode.
    """
    from pipeline.method.attack import AttackSettings, attack

    settings = AttackSettings(norm=norm, eps=eps, alpha=alpha, steps=steps)  # type: ignore[arg-type]
    if norm == "linf":
        noise = (2 * torch.rand(x.shape, generator=generator, device=generator.device) - 1) * eps
    else:
        noise = torch.randn(x.shape, generator=generator, device=generator.device)
        noise *= eps / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    starts = torch.rand(len(x), 1, 1, 1, generator=generator, device=generator.device) < random_start
    with _mode(student, training), through(student, norms):
        return attack(
            x, y, student, discretizer, settings, (noise * starts).to(x.device, non_blocking=True)
        ).adversarial


def discrete_images(
    attack: Callable[..., torch.Tensor], discretizer: Quantizer, x: torch.Tensor, y: torch.Tensor, **options: Any
) -> torch.Tensor:
    """DAT's images: Q of an L2 attack from Q(x) or, with probability `DAT_START`, from a random point around it.

    attack: `Step.attack`. options: of `adversarial_images`.
    """
    return attack(x, y, norm="l2", random_start=DAT_START, discretizer=discretizer, **options)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)
