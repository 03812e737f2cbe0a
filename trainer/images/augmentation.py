"""Random changes of training images, one by one, in the loader workers. All random numbers come from one generator.

Pixels stay uint8 throughout: torchvision crops them ten times faster than floats.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
from pydantic import Field

from manifests import recipe_dataclass
from manifests.recipe import Share

MEAN_COLOUR = (124, 116, 104)  # mean of ImageNet; erased pixels take it


@recipe_dataclass
class Augmentation:
    """Random changes of training images, with the same settings for clean and DAD images."""

    flip: Share = 0.5
    """Probability of a horizontal flip."""
    crop: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Smallest side of a random square crop, as a fraction of the image's side. 1: no crop."""
    colour: Share = 0.0
    """Strength of colour jitter: random factors in 1 ± colour scale brightness, contrast and saturation."""
    grey: Share = 0.0
    """Probability of turning an image grey."""
    randaugment: Annotated[int, Field(ge=0, le=8)] = 0
    """Number of RandAugment's operations (Cubuk et al., 2020) on every image. 0: none."""
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Strength of RandAugment on torchvision's scale, whose 30 is level 10 of the original."""
    erase: Share = 0.0
    """Probability of erasing a random rectangle (Zhong et al., 2020)."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """alpha of Mixup's Beta distribution. Images, labels and soft labels are mixed by the same lambda. 0: none."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """alpha of CutMix's Beta distribution. 0: none. If both are set, each image takes one of the two at even odds."""


class Augment:
    """Callable on (uint8 images [B, 3, H, H], generator) -> uint8 images [B, 3, side, side]."""

    def __init__(self, settings: Augmentation, side: int) -> None:
        from torchvision.transforms import v2  # not at the top: reading a recipe must be quick

        self.settings, self.side, self.ops = settings, side, v2.functional
        self.randaugment = v2.RandAugment(
            settings.randaugment, settings.magnitude, interpolation=v2.InterpolationMode.BILINEAR
        )
        self.erase = v2.RandomErasing(settings.erase, value=MEAN_COLOUR)

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.stack([self.augment(image, generator) for image in images])

    def augment(self, image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """One image, uint8 [3, H, H] -> [3, side, side].

        The order is crop, flip, RandAugment, colours, grey, erasing.
        """
        settings, F = self.settings, self.ops
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
    """Seed torch's global generator from ``generator`` for torchvision's transforms; restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield
