"""Random changes of a batch of training images. Runs in the loader workers; every number comes from the given generator."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from shards.codec import to_uint8

from .recipe import Augmentation


class Augment:
    """Callable on (uint8 images [B, 3, H, W], generator) -> uint8 images of the same shape."""

    def __init__(self, settings: Augmentation) -> None:
        self.settings = settings

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        settings = self.settings
        flip = torch.rand(len(images), generator=generator) < settings.flip
        if settings.crop < 1:
            pixels = _crop(images.float() / 255, flip, settings.crop, generator)
        else:
            pixels = torch.where(flip[:, None, None, None], images.flip(3), images).float() / 255
        if settings.colour:
            pixels = _jitter(pixels, settings.colour, generator)
        grey = torch.rand(len(images), generator=generator) < settings.grey
        pixels = torch.where(grey[:, None, None, None], _luminance(pixels), pixels)
        return to_uint8(pixels)


def _crop(images: torch.Tensor, flip: torch.Tensor, smallest: float, generator: torch.Generator) -> torch.Tensor:
    """A random square inside each image, resized back bilinearly, mirrored where ``flip``."""
    scale = torch.empty(len(images)).uniform_(smallest, 1.0, generator=generator)
    shift = torch.empty(len(images), 2).uniform_(-1, 1, generator=generator) * (1 - scale)[:, None]
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = torch.where(flip, -scale, scale)
    theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _jitter(images: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Brightness, contrast and saturation, in this order, as torchvision's ColorJitter does one by one."""
    brightness, contrast, saturation = torch.empty(3, len(images), 1, 1, 1).uniform_(1 - strength, 1 + strength, generator=generator)
    images = (images * brightness).clamp(0, 1)
    mean = _luminance(images).mean((2, 3), keepdim=True)
    images = (mean + (images - mean) * contrast).clamp(0, 1)
    grey = _luminance(images)
    return (grey + (images - grey) * saturation).clamp(0, 1)


def _luminance(images: torch.Tensor) -> torch.Tensor:
    """[B, 1, H, W], ITU-R 601 weights."""
    return (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
