"""The batch size found by itself: the smallest that is about as fast as any that fits the device's memory."""

from __future__ import annotations

from dataclasses import replace

import click
import torch

from manifests import RunDir, UserError
from manifests.rundir import RUN

from ..job.models import Models
from ..recipe import Recipe
from .measure import TrialBatch, bare_calls, timed

ON_CPU = 16  # there, images/s hardly depends on it, and memory does
LARGEST = 1024
WORTH_IT = 1.03  # a larger batch must be this much faster


def resolve_batch(recipe: Recipe, out: RunDir, models: Models | None) -> Recipe:
    """A recipe whose ``batch`` is a number: its own, that of the run already in ``out``, or the one found on the models' device.

    models: None when they will be elsewhere. Raises UserError when nothing says what would fit there, or not even one image does.
    """
    if recipe.batch:
        return recipe
    if out.store.exists(RUN):
        return replace(recipe, batch=int(out.info().recipe["batch"]))
    if models is None:
        raise UserError(
            "batch: 0 is found on the device that will do the work, and that is elsewhere; run `python -m pipeline plan` there"
        )
    batch = find_batch(recipe, models)
    click.echo(f"batch: {batch} images per model call", err=True)
    return replace(recipe, batch=batch)


def find_batch(recipe: Recipe, models: Models) -> int:
    """Double the batch while it fits and pays. Raises UserError when not even one image fits."""
    return ON_CPU if models.device.type != "cuda" else smallest_that_pays(recipe, models)


def smallest_that_pays(recipe: Recipe, models: Models) -> int:
    """The search itself, with the models uncompiled. Raises UserError like `find_batch`.

    From one size to the next torch.compile would make graphs for any shape, and the run would use those: other bits than those of a
    process that comes later and compiles for its one size.
    """
    models = replace(models, compiled=None)
    best, best_speed, batch = 0, 0.0, 1
    while batch <= LARGEST:
        speed = images_per_second(recipe, models, batch)
        if speed is None:
            break
        if speed > WORTH_IT * best_speed:
            best, best_speed = batch, speed
        batch *= 2
    if best > 1 and speed is None and best == batch // 2:
        best //= 2  # several batches are in flight in a run, one was here
    if not best:
        raise UserError(
            f"device: {models.device}: not even one image of {recipe.canvas} pixels fits its memory beside the models"
        )
    return best


def images_per_second(recipe: Recipe, models: Models, batch: int, repeats: int = 2) -> float | None:
    """Speed of the model calls alone, on made-up images; None when the device's memory is too small."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, 3, recipe.canvas, recipe.canvas), dtype=torch.uint8, generator=generator)
    try:
        trial = TrialBatch.of(pixels, recipe, models)
        bare_calls(trial, recipe, models)  # warm-up
        return batch / min(timed(lambda: bare_calls(trial, recipe, models), models.device) for _ in range(repeats))
    except torch.OutOfMemoryError:
        return None
    except RuntimeError:  # a kernel that cannot index so much
        if models.device.type != "cuda" or batch == 1:
            raise
        return None
    finally:
        if models.device.type == "cuda":
            torch.cuda.empty_cache()
