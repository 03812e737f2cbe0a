"""Find the batch size: the smallest that is about as fast as any that fits the device's memory."""

from __future__ import annotations

from dataclasses import replace

import click
import torch

from manifests import RunDir, UserError
from manifests.rundir import RUN

from ..job.models import Models
from ..recipe import Recipe
from .measure import TrialBatch, bare_calls, timed

ON_CPU = 16  # on a CPU, a larger batch takes more memory and is hardly faster
LARGEST = 1024
WORTH_IT = 1.03  # a larger batch must be faster by this factor


def resolve_batch(recipe: Recipe, out: RunDir, models: Models | None) -> Recipe:
    """Replace ``batch: 0`` by a number: that of the run already in ``out``, or the best on this device.

    models: None when the workers run elsewhere. Raises UserError when nothing says what fits there, or when not even
    one image fits.
    """
    if recipe.batch:
        return recipe
    if out.store.exists(RUN):
        return replace(recipe, batch=int(out.info().recipe["batch"]))
    if models is None:
        raise UserError(
            "batch: 0 is measured on the device, and the workers run elsewhere; run `python -m pipeline plan` there, "
            "and set batch to what it says"
        )
    batch = find_batch(recipe, models)
    click.echo(f"batch: {batch} images per model call", err=True)
    return replace(recipe, batch=batch)


def find_batch(recipe: Recipe, models: Models) -> int:
    """Double the batch while it fits and pays. Raises UserError when not even one image fits."""
    return ON_CPU if models.device.type != "cuda" else smallest_that_pays(recipe, models)


def smallest_that_pays(recipe: Recipe, models: Models) -> int:
    """Search with uncompiled models. Raises UserError like `find_batch`.

    Compiled models would get graphs for any batch size from the search, and the run would use them; a later process,
    which compiles for one size only, would then give other bits.
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
        best //= 2  # a run has several batches in flight, the search had one
    if not best:
        raise UserError(
            f"device: {models.device}: not even one image of {recipe.canvas} pixels fits its memory beside the models"
        )
    return best


def images_per_second(recipe: Recipe, models: Models, batch: int, repeats: int = 2) -> float | None:
    """Speed of the model calls alone, on random images; None when the device's memory is too small."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, 3, recipe.canvas, recipe.canvas), dtype=torch.uint8, generator=generator)
    try:
        trial = TrialBatch.of(pixels, recipe, models)
        bare_calls(trial, recipe, models)  # warm-up
        return batch / min(timed(lambda: bare_calls(trial, recipe, models), models.device) for _ in range(repeats))
    except torch.OutOfMemoryError:
        return None
    except RuntimeError:  # some kernels cannot index such large tensors
        if models.device.type != "cuda" or batch == 1:
            raise
        return None
    finally:
        if models.device.type == "cuda":
            torch.cuda.empty_cache()
