"""Strong colour and texture augmentation: the teacher and the discretizer see more of the world than students do.

Batched tensor functions on [B, 3, H, W] images in [0, 1]; every choice is made per image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def augment(images: torch.Tensor, generator: torch.Generator, strength: float = 1.0) -> torch.Tensor:
    """Randomly flip, recolour, grey, turn into line art, invert, blur and add noise. Returns new images in [0, 1].

    ``strength`` scales the probability of each transformation.
    """
    images = images.clone()

    def sometimes(probability: float, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        chosen = torch.rand(len(images), generator=generator) < probability * strength
        if chosen.any():
            images[chosen] = change(images[chosen])

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:  # one number per image
        return torch.empty(len(like), 1, 1, 1).uniform_(low, high, generator=generator)

    sometimes(0.5, lambda x: x.flip(3))
    sometimes(0.25, lambda x: _shuffle_channels(x, generator))
    sometimes(0.5, lambda x: _mix_colours(x, generator))
    sometimes(0.25, lambda x: x.mean(1, keepdim=True).expand_as(x))
    sometimes(0.2, line_art)
    sometimes(0.2, lambda x: 1 - x)
    sometimes(0.6, lambda x: ((x - 0.5) * uniform(x, 0.5, 1.6) + 0.5 + uniform(x, -0.25, 0.25)).clamp(0, 1))
    sometimes(0.15, lambda x: (x * 4).round() / 4)
    sometimes(0.25, _blur)
    sometimes(0.4, lambda x: (x + torch.randn(x.shape, generator=generator) * uniform(x, 0.0, 0.15)).clamp(0, 1))
    return images


def line_art(images: torch.Tensor) -> torch.Tensor:
    """Draw dark lines on white where the brightness or a colour changes: a crude drawing of the same object."""
    kernel = images.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
    kernels = torch.stack([kernel, kernel.t()])[:, None].repeat(3, 1, 1, 1)
    gradients = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernels, groups=3)
    edges = gradients.square().sum(1, keepdim=True).sqrt()
    edges = edges / edges.amax((2, 3), keepdim=True).clamp(min=0.1)
    return (1 - 1.5 * edges).clamp(0, 1).expand_as(images)


def _shuffle_channels(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    order = torch.rand(len(images), 3, generator=generator).argsort(1)
    return images.gather(1, order[:, :, None, None].expand_as(images))


def _mix_colours(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Apply a random linear map of the colour space around grey, which changes hue and saturation together."""
    mix = torch.eye(3) + 0.5 * torch.randn(len(images), 3, 3, generator=generator)
    mix = mix / mix.sum(2, keepdim=True).abs().clamp(min=0.5)
    return (torch.einsum("bij,bjhw->bihw", mix, images - 0.5) + 0.5).clamp(0, 1)


def _blur(images: torch.Tensor) -> torch.Tensor:
    kernel = images.new_tensor([1.0, 2.0, 1.0]).outer(images.new_tensor([1.0, 2.0, 1.0])) / 16
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel.repeat(3, 1, 1, 1), groups=3)
