"""Random changes of training images. Runs in the loader workers, image by image; every number comes from the given generator.

Pixels stay uint8 throughout: torchvision's integer kernels take a tenth of the time of the same crop in float.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .recipe import Augmentation

MEAN_COLOUR = (124, 116, 104)  # of ImageNet: what erased pixels become


class Augment:
    """Callable on (uint8 images [B, 3, H, H], generator) -> uint8 images [B, 3, side, side]."""

    def __init__(self, settings: Augmentation, side: int) -> None:
        self.settings, self.side = settings, side
        self.randaugment = v2.RandAugment(settings.randaugment, settings.magnitude, interpolation=v2.InterpolationMode.BILINEAR)
        self.erase = v2.RandomErasing(settings.erase, value=MEAN_COLOUR)

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.stack([self.augment(image, generator) for image in images])

    def augment(self, image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """One image, uint8 [3, H, H] -> [3, side, side]: crop and flip, RandAugment, colours, grey, erasing, in this order."""
        settings = self.settings
        size, top, left, flip, brightness, contrast, saturation, grey = torch.rand(8, generator=generator).tolist()
        full = image.shape[-1]
        cut = round(full * (settings.crop + size * (1 - settings.crop)))
        corner = [round(place * (full - cut)) for place in (top, left)]
        image = F.resized_crop(image, *corner, cut, cut, [self.side, self.side], antialias=True)
        if flip < settings.flip:
            image = F.horizontal_flip(image)
        if settings.randaugment:
            with _drawing_from(generator):
                image = self.randaugment(image)
        if settings.colour:
            low, spread = 1 - settings.colour, 2 * settings.colour
            image = F.adjust_brightness(image, low + spread * brightness)
            image = F.adjust_contrast(image, low + spread * contrast)
            image = F.adjust_saturation(image, low + spread * saturation)
        if grey < settings.grey:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        if settings.erase:
            with _drawing_from(generator):
                image = self.erase(image)
        return image


@contextmanager
def _drawing_from(generator: torch.Generator) -> Iterator[None]:
    """torchvision's transforms draw from torch's global generator: seed it from ``generator``, and set it back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield
