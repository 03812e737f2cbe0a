"""An endless stream of composed, augmented glyph batches for training the demo's teacher and discretizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .augment import augment
from .glyphs import load_glyphs
from .scene import PAPER, TRAIN, V2, SceneStyle, draw_scenes, render_scenes


class GlyphSampler:
    """Draws batches of random glyphs of ``styles``, with scenes of every kind; a seed repeats them."""

    scenes: Sequence[SceneStyle] = (TRAIN, TRAIN, V2, PAPER)

    def __init__(self, styles: Sequence[str], seed: int) -> None:
        glyphs = load_glyphs()
        pairs = [(rgba, label) for style in styles for label, rgba in glyphs[style].items()]
        self.glyphs = torch.stack([rgba for rgba, _ in pairs])
        self.labels = torch.tensor([label for _, label in pairs])
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, size: int, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [size, 3, 64, 64] in [0, 1] and labels [size]; ``size`` is a multiple of ``len(scenes)``."""
        chosen = torch.randint(len(self.glyphs), (size,), generator=self.generator)
        share = size // len(self.scenes)
        parts = [
            render_scenes(self.glyphs[part], draw_scenes(share, style, self.generator))
            for part, style in zip(chosen.split(share), self.scenes, strict=True)
        ]
        return augment(torch.cat(parts), self.generator, strength), self.labels[chosen]
