"""Compose glyphs into images: a random pose on a random low-frequency background. Pure tensor functions.

`draw_scenes` draws all random numbers from a generator; `render_scenes` applies them. So an image is the same whether
it is composed alone or in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

CANVAS = 64  # pixels
GRID = 5  # background control points per side; upsampled bicubically to the canvas


@dataclass(frozen=True, kw_only=True)
class SceneStyle:
    """Distribution of poses and backgrounds. Lengths are fractions of the canvas, angles degrees."""

    scale: tuple[float, float] = (0.65, 1.0)
    angle: float = 15.0
    shift: float = 0.12
    shear: float = 0.1
    contrast: float = 0.35  # spread of the background around its mean colour
    brightness: tuple[float, float] = (0.2, 0.9)
    colourful: float = 0.2  # spread between the channels of the background's mean colour


TRAIN = SceneStyle()
# plays the part of ImageNet-V2, a new test set by other people: other poses, busier and more colourful backgrounds
V2 = SceneStyle(scale=(0.5, 0.9), angle=30.0, shift=0.2, shear=0.2, contrast=0.5, brightness=(0.1, 1.0), colourful=0.3)
# sketches are ink on paper
PAPER = SceneStyle(contrast=0.05, brightness=(0.85, 1.0), colourful=0.03)


@dataclass(frozen=True)
class Scenes:
    """The random numbers of B images."""

    affine: torch.Tensor  # [B, 2, 3], canvas -> glyph coordinates in [-1, 1]
    background: torch.Tensor  # [B, 3, GRID, GRID] in [0, 1]

    @staticmethod
    def concatenate(scenes: list[Scenes]) -> Scenes:
        return Scenes(torch.cat([s.affine for s in scenes]), torch.cat([s.background for s in scenes]))


def draw_scenes(count: int, style: SceneStyle, generator: torch.Generator) -> Scenes:
    """Draw the random numbers of ``count`` images."""

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.empty(count, *shape).uniform_(low, high, generator=generator)

    angle = uniform(-style.angle, style.angle).deg2rad()
    shear = uniform(-style.shear, style.shear)
    scale = uniform(*style.scale)
    shift = uniform(-2 * style.shift, 2 * style.shift, 2)  # the canvas is 2 units wide in grid_sample's coordinates
    rotation = torch.stack(
        [torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)], 1
    )
    shearing = torch.eye(2).repeat(count, 1, 1)
    shearing[:, 0, 1] = shear
    inverse = torch.linalg.inv(rotation @ shearing * scale[:, None, None])
    affine = torch.cat([inverse, -inverse @ shift[:, :, None]], dim=2)

    mean = uniform(*style.brightness, 1, 1, 1) + uniform(-style.colourful, style.colourful, 3, 1, 1)
    background = (mean + uniform(-style.contrast, style.contrast, 3, GRID, GRID)).clamp(0, 1)
    return Scenes(affine, background)


def render_scenes(glyphs: torch.Tensor, scenes: Scenes) -> torch.Tensor:
    """Compose images.

    glyphs: [B, 4, H, W] uint8, straight-alpha RGBA. Returns float32 images [B, 3, CANVAS, CANVAS] in [0, 1].
    """
    rgba = glyphs.float() / 255
    alpha = rgba[:, 3:]
    premultiplied = torch.cat([rgba[:, :3] * alpha, alpha], dim=1)  # resampling straight alpha would leave dark fringes
    grid = F.affine_grid(scenes.affine, [len(glyphs), 4, CANVAS, CANVAS], align_corners=False)
    posed = F.grid_sample(premultiplied, grid, mode="bilinear", align_corners=False)
    background = F.interpolate(scenes.background, size=(CANVAS, CANVAS), mode="bicubic", align_corners=True).clamp(0, 1)
    return (posed[:, :3] + background * (1 - posed[:, 3:])).clamp(0, 1)
