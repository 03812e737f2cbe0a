"""From a source sample to the canvas (the method's step 0), on the CPU, ahead of the models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from shards import decode_image, encode_image
from shards.canvas import BadImage, load_canvas
from shards.sources import Piece, SourceSample
from shards.sources.classes import ClassList
from shards.views import draw_views, view_images

from ..method.attack import draw_noise
from ..recipe import Recipe


@dataclass(frozen=True)
class Prepared:
    """A source sample on the canvas, or the problem that kept it from there."""

    source: SourceSample
    clean_bytes: bytes = b""  # the encoded image as stored
    clean: torch.Tensor | None = None  # as a reader will decode it, uint8 [3, S, S]
    noise: torch.Tensor | None = None  # the random start, float32 [3, S, S]
    views: np.ndarray | None = None  # VIEW records [V]; None for the whole canvas alone
    view_pixels: torch.Tensor | None = None  # the views of `clean`, uint8 [V, 3, S, S]
    problem: str | None = None


def prepare_sample(source: SourceSample, recipe: Recipe) -> Prepared:
    """Decode, bring onto the canvas, encode and decode again; draw the random start. A bad sample gets its problem."""
    if source.problem is not None:
        return Prepared(source, problem=source.problem)
    try:
        canvas = load_canvas(source.data, recipe.canvas)
    except BadImage as error:
        return Prepared(source, problem=str(error))
    noise = draw_noise([source.key], canvas.shape, recipe.attack, recipe.seed)[0]
    data, clean = b"", canvas
    if recipe.output.clean_images:
        data = encode_image(canvas, recipe.output.image)
        clean = decode_image(data)
    views = draw_views(source.key, recipe.seed, recipe.views, recipe.canvas)
    return Prepared(source, data, clean, noise, views, None if views is None else view_images(clean, views))


def prepare(piece: Piece, recipe: Recipe, classes: ClassList) -> Iterator[Prepared]:
    """Prepare the samples of a piece, one after the other."""
    return (prepare_sample(source, recipe) for source in piece.samples(classes))


def batches(samples: Iterable[Prepared], size: int) -> Iterator[list[Prepared]]:
    """Cut samples into lists with ``size`` usable ones each (fewer in the last); unusable ones keep their place."""
    batch: list[Prepared] = []
    usable = 0
    for sample in samples:
        batch.append(sample)
        usable += sample.clean is not None
        if usable == size:
            yield batch
            batch, usable = [], 0
    if batch:
        yield batch
