"""Training schemes that make their adversarial images, or ask their teacher, anew in every step: what DAD is compared with (table 7).

Pure functions from models and a batch to a loss, beside `objectives`. Images are [B, 3, H, W] in [0, 1], labels [B], and every random
number comes from the generator. Costs are stated in passes an image: a *training pass* is a forward pass and the gradients of inputs and
weights; an *attack pass* is a forward pass and the gradient of the input alone, about two thirds of it. The paper counts both as one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Teacher = Callable[[torch.Tensor], torch.Tensor]  # images -> logits [B, classes]
Quantizer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # images -> (images, codes)


def no_discretizer(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Leaves pixels as they are."""
    return images, images.new_empty(0)


def adversarial_images(
    model: nn.Module,
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
) -> torch.Tensor:
    """Images that a model in training is attacked with: the attack of stage 1 with the student as its teacher. ``steps`` attack passes.

    eps, alpha: radius and step, in units of pixel values. random_start: probability of starting at a random point of the ball (Linf)
    or sphere (L2). The model is in eval mode meanwhile, so that batch norm's running statistics do not follow half-made images.
    """
    from pipeline.method.attack import AttackSettings, attack

    settings = AttackSettings(norm=norm, eps=eps, alpha=alpha, steps=steps)  # type: ignore[arg-type]
    if norm == "linf":
        noise = (2 * torch.rand(x.shape, generator=generator, device=generator.device) - 1) * eps
    else:
        noise = torch.randn(x.shape, generator=generator, device=generator.device)
        noise *= eps / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    starts = torch.rand(len(x), 1, 1, 1, generator=generator, device=generator.device) < random_start
    was_training = model.training
    model.eval()
    try:
        return attack(x, y, model, discretizer, settings, (noise * starts).to(x.device, non_blocking=True)).adversarial
    finally:
        model.train(was_training)
