"""The forecast of a run: its cost and what it lacks (``python -m pipeline plan``). Reads everything, writes nothing."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

import click
import numpy as np
import torch

from manifests import RunDir, UserError
from manifests.devices import choose_device, usable_cores
from manifests.rundir import RUN
from shards import encode_image
from shards.codec import to_float, to_uint8
from shards.sources import ImageSource
from shards.sources.classes import ClassList, find_classes
from shards.tar import BLOCK
from shards.views import soft_label_members

from ..job.models import Models, compile_models, models_on_device, resolve_precision
from ..job.prepare import Prepared, prepare_sample
from ..method.discretizer import build_discretizer
from ..method.open_clip_models import RANDOM
from ..method.teacher import load_teacher
from ..recipe import Recipe, source_of
from .batch_size import images_per_second, resolve_batch
from .measure import TrialBatch, count_flops, device_name, model_parts, timed

T = TypeVar("T")
LOOKED_AT = 32  # number of source samples that are decoded
DISCRETIZED = 4  # number of those that Q discretizes, to compare sizes in bytes; takes a CPU some seconds


@dataclass
class Forecast:
    """The lines known so far, and what is missing."""

    lines: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # one line each, with the fix

    def attempt(self, step: Callable[[], T]) -> T | None:
        """Run a step. If it fails, add its message to what is missing, and return None."""
        try:
            return step()
        except UserError as error:
            self.missing.append(str(error))
            return None


def forecast(recipe: Recipe, out: str) -> Forecast:
    """Forecast images, work per image, speed on this device, hours, bytes; and list what is missing, with the fix."""
    found = Forecast()
    classes = found.attempt(lambda: find_classes(recipe.source.classes)[0])
    source = None
    if classes is not None:
        source = found.attempt(lambda: source_of(recipe, classes))
        found.lines.append(f"classes     {len(classes.names):,} ({recipe.source.classes})")
    if source is not None:
        images = f"{'' if source.exact else 'about '}{source.samples:,} images in {len(source.pieces):,} shards"
        found.lines.append(f"source      {images} ({source.kind}: {recipe.source.data})")
    device = found.attempt(lambda: choose_device(recipe.device))
    if device is not None:
        recipe = found.attempt(lambda: resolve_precision(recipe, RunDir(out), str(device))) or recipe
    models, stand_in = _models(recipe, classes, device, found)
    if models is not None:
        speed = _speed_lines(recipe, models, out, found, stand_in)
        if source is not None:
            seconds = source.samples / speed
            time, hours = datetime.timedelta(seconds=round(seconds)), f"{seconds / 3600:,.2f} hours"
            found.lines.append(f"time        {time} for {source.samples:,} images on this device ({hours})")
    if source is not None and classes is not None:
        found.lines += (
            found.attempt(lambda: list(_source_lines(recipe, source, classes, None if stand_in else models, found)))
            or []
        )
    run = RunDir(out)
    if run.store.exists(RUN):
        found.lines.append(f"output      {out}: a run is there already; see `python -m pipeline status {out}`")
    return found


def _models(
    recipe: Recipe, classes: ClassList | None, device: torch.device | None, found: Forecast
) -> tuple[Models | None, bool]:
    """(The models, whether random weights stand in for missing ones.) Speed does not depend on the weights."""
    if classes is None or device is None:
        return None, False
    before = len(found.missing)
    silent = Forecast()
    discretizer = found.attempt(lambda: build_discretizer(recipe.discretizer))
    discretizer = discretizer or silent.attempt(lambda: build_discretizer(replace(recipe.discretizer, weights=RANDOM)))
    teacher = found.attempt(lambda: load_teacher(recipe.teacher, classes, device))
    teacher = teacher or silent.attempt(lambda: load_teacher(replace(recipe.teacher, weights=RANDOM), classes, device))
    if teacher is None or discretizer is None:
        return None, True
    models = found.attempt(lambda: models_on_device(teacher, discretizer, replace(recipe, compile=False), device))
    return models, len(found.missing) > before


def _speed_lines(recipe: Recipe, models: Models, out: str, found: Forecast, stand_in: bool) -> float:
    """Add the lines on work per image and speed; returns images/s."""
    one = TrialBatch.of(_noise(1, recipe.canvas), recipe, models)
    parts = model_parts(one, recipe, models)
    flops = {part.name: part.times * count_flops(part.call) for part in parts}
    work = ", ".join(f"{part.name} x{part.times} {flops[part.name] / 1e9:,.1f}" for part in parts)
    found.lines.append(f"work        {sum(flops.values()) / 1e9:,.1f} GFLOP an image: {work}")
    batch = (found.attempt(lambda: resolve_batch(recipe, RunDir(out), models)) or replace(recipe, batch=1)).batch
    if models.device.type != "cuda":
        batch = min(batch, max(1, round(5e12 / sum(flops.values()))))  # takes a CPU some seconds
    eager = images_per_second(recipe, models, batch)
    speed, note = eager or 0.0, ""
    if eager is None:
        fix = "--set batch=0 measures which size does"
        found.missing.append(f"batch: {batch} images do not fit the memory of {models.device}; {fix}")
        speed = images_per_second(recipe, models, 1) or 1e-9
    elif models.device.type == "cuda":
        compiled = images_per_second(recipe, compile_models(models), batch) or 0.0
        better = compiled > eager
        note = f"; torch.compile {'on' if recipe.compile else 'off'}: {compiled if recipe.compile else eager:,.1f}, "
        note += f"{'off' if recipe.compile else 'on'}: {eager if recipe.compile else compiled:,.1f}"
        if better != recipe.compile:
            note += f" (--set compile={str(better).lower()})"
        speed = compiled if recipe.compile else eager
    stand = " (random weights stand in for what is missing)" if stand_in else ""
    rate = f"{speed:,.2f} images/s, {speed * sum(flops.values()) / 1e12:,.2f} TFLOP/s on {device_name(models.device)}"
    found.lines.append(f"speed       {rate}, batch {batch}, {recipe.precision}{note}{stand}")
    return speed


def _source_lines(
    recipe: Recipe, source: ImageSource, classes: ClassList, models: Models | None, found: Forecast
) -> Iterator[str]:
    samples = found.attempt(lambda: source.first_samples(classes, LOOKED_AT)) or []
    prepared: list[Prepared] = []
    seconds = timed(lambda: prepared.extend(prepare_sample(sample, recipe) for sample in samples), torch.device("cpu"))
    good = [sample for sample in prepared if sample.clean is not None]
    if bad := next((sample for sample in prepared if sample.clean is None), None):
        count = f"{len(prepared) - len(good)} of the first {len(prepared)} samples cannot be used"
        found.missing.append(f"source.data: {count}, the first {bad.source.key!r}: {bad.problem}")
    if not good:
        return
    cores = usable_cores()
    yield f"decoding    {1000 * seconds / len(prepared):.1f} ms an image on one of {cores} cores, beside the models"
    image = sum(
        _member(len(encode_image(sample.clean, recipe.output.image))) for sample in good if sample.clean is not None
    ) / len(good)
    logits = np.zeros((recipe.views.count, len(classes.names)), np.float16)
    soft_labels = soft_label_members(logits, good[0].views, recipe.views)
    labels = _member(1) + sum(_member(len(data)) for data in soft_labels.values())
    codes = recipe.output.codes and recipe.discretizer.kind == "vqgan"
    side = recipe.canvas // recipe.discretizer.config.downsampling
    clean = (labels + (image if recipe.output.clean_images else 0)) * source.samples
    growth = _growth(good[:DISCRETIZED], recipe, models) if models else 1.0
    dad = (labels + growth * image + (_member(128 + 2 * side * side) if codes else 0)) * source.samples
    manifest = _bytes(100 * source.samples)
    most = f"DAD up to {_bytes(dad)} (if all images are verified)"
    yield f"output      clean {_bytes(clean)}, {most}, a manifest of about {manifest}"


def _member(size: float) -> float:
    """Bytes that a member of ``size`` bytes takes in a tar, with its header."""
    return BLOCK + -(-size // BLOCK) * BLOCK


def _growth(samples: list[Prepared], recipe: Recipe, models: Models) -> float:
    """Stored bytes of Q(x) over stored bytes of x. x'' is about as large as Q(x)."""
    pixels = torch.stack([sample.clean for sample in samples if sample.clean is not None])
    with torch.no_grad():
        discrete, _ = models.discretizer(to_float(models.send(pixels)))
    before, after = (
        sum(len(encode_image(image, recipe.output.image)) for image in images)
        for images in (pixels, to_uint8(discrete).cpu())
    )
    return after / before


def _noise(count: int, side: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def show(found: Forecast) -> None:
    """Print a forecast. Raises UserError when something is missing."""
    click.echo("\n".join(found.lines))
    for line in found.missing:
        click.echo(f"MISSING     {line}")
    if found.missing:
        things = "thing is" if len(found.missing) == 1 else "things are"
        raise UserError(f"not ready: {len(found.missing)} {things} missing (see above)")
    click.echo("ready: `make shards` with the same arguments makes it")
