"""Random changes of training images. Runs in the loader workers, image by image; every number comes from the given generator.

Pixels stay uint8 throughout: torchvision's integer kernels take a tenth of the time of the same crop in float.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
from pydantic import Field

from manifests import recipe_dataclass
from manifests.recipe import Share

MEAN_COLOUR = (124, 116, 104)  # of ImageNet: what erased pixels become


@recipe_dataclass
class Augmentation:
    """Random changes of the training images, the same kind for clean and DAD images."""

    flip: Share = 0.5
    """Probability of a horizontal flip."""
    crop: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Smallest side of a random square crop, as a fraction of the image; it is resized to the input. 1: no crop."""
    colour: Share = 0.0
    """Strength of colour jitter: brightness, contrast and saturation are scaled by random factors in 1 ± colour."""
    grey: Share = 0.0
    """Probability of turning an image grey."""
    randaugment: Annotated[int, Field(ge=0, le=8)] = 0
    """Operations of RandAugment (Cubuk et al., 2020) on every image. 0: none."""
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Strength of RandAugment on torchvision's scale, whose 30 is level 10 of the original."""
    erase: Share = 0.0
    """Probability of erasing a random rectangle (Zhong et al., 2020)."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """alpha of Mixup's Beta distribution; soft labels are mixed by the same lambda as images. 0: none."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """alpha of CutMix's. Where both are set, each image takes one of the two at even odds."""


class Augment:
    """Callable on (uint8 images [B, 3, H, H], generator) -> uint8 images [B, 3, side, side]."""

    def __init__(self, settings: Augmentation, side: int) -> None:
        from torchvision.transforms import v2  # not at the top: recipes hold an `Augmentation`

        self.settings, self.side, self.ops = settings, side, v2.functional
        self.randaugment = v2.RandAugment(
            settings.randaugment, settings.magnitude, interpolation=v2.InterpolationMode.BILINEAR
        )
        self.erase = v2.RandomErasing(settings.erase, value=MEAN_COLOUR)

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.stack([self.augment(image, generator) for image in images])

    def augment(self, image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """One image, uint8 [3, H, H] -> [3, side, side]: crop and flip, RandAugment, colours, grey, erasing, in this order."""
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
    """torchvision's transforms draw from torch's global generator: seed it from ``generator``, and set it back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield
