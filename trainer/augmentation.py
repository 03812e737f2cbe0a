"""Random changes of a batch of training images. Runs in the loader workers; every number comes from the given generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from shards.codec import to_float, to_uint8

from .recipe import Augmentation

MEAN_COLOUR = (0.485, 0.456, 0.406)  # of ImageNet: what erased pixels become


class Augment:
    """Callable on (uint8 images [B, 3, H, W], generator) -> uint8 images [B, 3, side, side]."""

    def __init__(self, settings: Augmentation, side: int) -> None:
        self.settings, self.side = settings, side
        self.randaugment = v2.RandAugment(settings.randaugment, settings.magnitude, interpolation=v2.InterpolationMode.BILINEAR)
        self.erase = v2.RandomErasing(settings.erase, value=MEAN_COLOUR)

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        settings = self.settings
        flip = torch.rand(len(images), generator=generator) < settings.flip
        if settings.crop < 1:
            pixels = _crop(to_float(images), self.side, flip, settings.crop, generator)
        else:
            pixels = resize(to_float(torch.where(flip[:, None, None, None], images.flip(3), images)), self.side)
        if settings.randaugment:
            with _drawing_from(generator):
                pixels = to_float(torch.stack([self.randaugment(image) for image in to_uint8(pixels)]))
        if settings.colour:
            pixels = _jitter(pixels, settings.colour, generator)
        grey = torch.rand(len(images), generator=generator) < settings.grey
        pixels = torch.where(grey[:, None, None, None], _luminance(pixels), pixels)
        if settings.erase:
            with _drawing_from(generator):
                pixels = torch.stack([self.erase(image) for image in pixels])
        return to_uint8(pixels)


def resize(images: torch.Tensor, side: int) -> torch.Tensor:
    """Float square images [B, 3, H, H] -> [B, 3, side, side], bilinear with antialiasing."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False)


@contextmanager
def _drawing_from(generator: torch.Generator) -> Iterator[None]:
    """torchvision's transforms draw from torch's global generator: seed it from ``generator``, and set it back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


def _crop(images: torch.Tensor, side: int, flip: torch.Tensor, smallest: float, generator: torch.Generator) -> torch.Tensor:
    """A random square inside each image, resized bilinearly to ``side``, mirrored where ``flip``."""
    scale = torch.empty(len(images)).uniform_(smallest, 1.0, generator=generator)
    shift = torch.empty(len(images), 2).uniform_(-1, 1, generator=generator) * (1 - scale)[:, None]
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = torch.where(flip, -scale, scale)
    theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, [len(images), 3, side, side], align_corners=False)
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
