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
        size = len(images)
        flip = torch.rand(size, generator=generator) < self.settings.flip
        scale = torch.empty(size).uniform_(self.settings.crop, 1.0, generator=generator)
        shift = torch.empty(size, 2).uniform_(-1, 1, generator=generator) * (1 - scale)[:, None]  # the crop stays inside
        theta = torch.zeros(size, 2, 3)
        theta[:, 0, 0] = torch.where(flip, -scale, scale)
        theta[:, 1, 1] = scale
        theta[:, :, 2] = shift
        if self.settings.crop == 1:
            return torch.where(flip[:, None, None, None], images.flip(3), images)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return to_uint8(F.grid_sample(images.float() / 255, grid, padding_mode="reflection", align_corners=False))
