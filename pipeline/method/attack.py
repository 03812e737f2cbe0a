"""The attack: one pure function from images to discrete adversarial images (paper eq. 9, update rule of DAT, sec. 3.2).

The gradient is taken at the discretized image and is not propagated through the discretizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from manifests.recipe import recipe_dataclass
from shards.seeds import seeded_generator

Classifier = Callable[[torch.Tensor], torch.Tensor]  # images [B, 3, H, W] in [0, 1] -> logits [B, classes]
Quantizer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # images -> (images, codes [B, h, w])


@recipe_dataclass
class AttackSettings:
    """Size and number of steps. Lengths are in pixel values in [0, 1]; defaults are the paper's, at 224 pixels."""

    norm: Literal["l2", "linf"] = "l2"
    """Norm of the ball around Q(x) that the perturbation stays in."""
    eps: Annotated[float, Field(ge=0)] = 0.1
    """Radius of that ball."""
    alpha: Annotated[float, Field(ge=0)] = 0.1
    """Length of one step (the paper's attack learning rate)."""
    steps: Annotated[int, Field(ge=0)] = 1
    """K. 0: no gradient, the paper's VQGAN-sample baseline (table 11)."""
    random_start: Annotated[float, Field(ge=0, le=1)] = 0.8
    """p0: probability of starting at a random point of the ball's surface (L2) or of the ball (Linf), not at Q(x)."""


@dataclass(frozen=True)
class Attacked:
    """The result of the attack on B images."""

    discrete: torch.Tensor  # Q(x), [B, 3, H, W] in [0, 1]
    perturbed: torch.Tensor  # x_K before the second discretization
    adversarial: torch.Tensor  # x'' = Q(x_K)
    codes_discrete: torch.Tensor  # [B, h, w] int64
    codes: torch.Tensor  # codes of x'', [B, h, w] int64


def attack(
    x: torch.Tensor,
    y: torch.Tensor,
    teacher: Classifier,
    discretizer: Quantizer,
    settings: AttackSettings,
    noise: torch.Tensor,
) -> Attacked:
    """Find discrete adversarial images of the teacher.

    x: images [B, 3, H, W] in [0, 1]; y: labels [B], or for mixed images their distribution, float [B, classes]; noise:
    random starts from `draw_noise` (zero rows start at Q(x)).
    teacher: differentiable with respect to its input. `verified` tells which images it still recognizes.
    """
    with torch.no_grad():
        discrete, codes_discrete = discretizer(x)
    perturbed = (discrete + noise).clamp(0, 1)
    for _ in range(settings.steps):
        gradient = loss_gradient(perturbed, y, teacher)
        delta = project(perturbed + step(gradient, settings) - discrete, settings)
        perturbed = (discrete + delta).clamp(0, 1)
    with torch.no_grad():
        adversarial, codes = discretizer(perturbed)
    return Attacked(discrete, perturbed, adversarial, codes_discrete, codes)


def loss_gradient(x: torch.Tensor, y: torch.Tensor, teacher: Classifier) -> torch.Tensor:
    """Gradient of the teacher's cross-entropy with respect to the images, [B, 3, H, W] float32.

    The loss is summed, so one image's gradient does not depend on the others of its batch.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = teacher(x).float()
        if y.is_floating_point():
            loss = F.cross_entropy(logits, y, reduction="sum")
        else:
            margin = _margin(logits, y)
            # CE = log(1 + e^m), so its gradient is sigmoid(m) dm. The gradient through softmax holds p_y - 1 instead,
            # which rounds to 0 below m = -17.
            loss = (margin.detach().sigmoid() * margin).sum()
        # not .backward(): the weights need no gradient, but keep requires_grad (open_clip is 10x slower on CPU without)
        (gradient,) = torch.autograd.grad(loss, x)
    return gradient.float()


def step(gradient: torch.Tensor, settings: AttackSettings) -> torch.Tensor:
    """One ascent step: alpha * g / |g| (L2) or alpha * sign g (Linf)."""
    if settings.norm == "linf":
        return settings.alpha * gradient.sign()
    largest = gradient.flatten(1).abs().amax(1).view(-1, 1, 1, 1).clamp(min=torch.finfo(gradient.dtype).tiny)
    direction = gradient / largest  # a confident teacher's gradient is small, and its square underflows
    return settings.alpha * direction / _lengths(direction).clamp(min=1e-12)


def project(delta: torch.Tensor, settings: AttackSettings) -> torch.Tensor:
    """Project perturbations onto the eps-ball."""
    if settings.norm == "linf":
        return delta.clamp(-settings.eps, settings.eps)
    return delta * (settings.eps / _lengths(delta).clamp(min=1e-12)).clamp(max=1.0)


def draw_noise(keys: Sequence[str], shape: Sequence[int], settings: AttackSettings, seed: int) -> torch.Tensor:
    """Draw random starts [len(keys), *shape]: with probability p0 at distance eps (L2) or in the cube (Linf), else 0.

    The seed is (run seed, key): a sample gets the same start whatever the shard, the worker or the retry.
    """
    return torch.stack([_noise(shape, settings, seeded_generator("attack", seed, key)) for key in keys])


def verified(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Whether the teacher classifies each image as its label: bool [B] from logits [B, classes] on stored images."""
    return logits.gather(1, y[:, None])[:, 0] == logits.amax(1)


def _noise(shape: Sequence[int], settings: AttackSettings, generator: torch.Generator) -> torch.Tensor:
    start = torch.rand((), generator=generator) < settings.random_start
    if not start:
        return torch.zeros(*shape)
    if settings.norm == "linf":
        return torch.empty(*shape).uniform_(-settings.eps, settings.eps, generator=generator)
    noise = torch.randn(*shape, generator=generator)
    return noise * (settings.eps / noise.norm())


def _margin(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """m = log(sum of e^z over the other classes) - z_y: [B] from logits [B, classes]. Cross-entropy is log(1 + e^m)."""
    label = y[:, None] == torch.arange(logits.shape[1], device=logits.device)
    return logits.masked_fill(label, -torch.inf).logsumexp(1) - logits.masked_fill(~label, 0).sum(1)


def _lengths(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
