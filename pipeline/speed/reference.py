"""The official algorithm's loop, only to be timed: float32, one batch after the other, image files written in the loop.

It follows a description of DAD's published generator: Q of the batch, one draw of the random start per batch, one step
of 0.1 on the teacher's cross-entropy, Q again, the teacher once more, one file per image.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import save_image

from ..method.discretizer import VQGAN


def reference_batch(x: torch.Tensor, y: torch.Tensor, teacher: nn.Module, discretizer: nn.Module, folder: Path) -> None:
    """Attack B images [B, 3, S, S] in [0, 1] and write each to ``folder``."""
    with torch.no_grad():
        start = _discretize(x, discretizer)
    adversarial = start.clone()
    if torch.rand(()) < 0.8:
        noise = torch.randn_like(start)
        adversarial = (start + 0.1 * _unit(noise)).clamp(0, 1)
    adversarial.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(teacher(adversarial), y), adversarial)
    with torch.no_grad():
        delta = (adversarial + 0.1 * _unit(gradient) - start).renorm(2, 0, 0.1)
        images = _discretize((start + delta).clamp(0, 1), discretizer)
        teacher(images).argmax(1)
        for i, image in enumerate(images):
            save_image(image, folder / f"{i:06d}.png")


def _discretize(x: torch.Tensor, discretizer: nn.Module) -> torch.Tensor:
    """Q as taming quantizes: all distances at once, then one-hot rows times the codebook."""
    if not isinstance(discretizer, VQGAN):
        return x
    latents = discretizer.latents(x).permute(0, 2, 3, 1)
    tokens, codebook = latents.reshape(-1, latents.shape[-1]), discretizer.codebook
    distances = tokens.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * tokens @ codebook.t()
    one_hot = torch.zeros_like(distances).scatter_(1, distances.argmin(1, keepdim=True), 1)
    quantized = (one_hot @ codebook).view(latents.shape).permute(0, 3, 1, 2)
    return discretizer.decode_latents(quantized).clamp(0, 1)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp(min=1e-12)
