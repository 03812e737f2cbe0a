"""How fast stage 1 is on this machine: the bare model calls, then the whole per-shard job, in turn in the same run.

``make bench-generate`` or ``python -m pipeline.benchmark --recipe demo``. Prints images/s, the share of the bare calls, and where the
time goes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import click
import torch

from manifests import RunDir, find_file
from manifests.command import ProjectGroup, set_option
from shards import decode_image, encode_image
from shards.codec import to_float, to_uint8

from .attack import attack, draw_noise, loss_gradient
from .classes import find_classes
from .models import load_models
from .recipe import load
from .shard_job import Prepared, prepare, run_shard
from .sources import plan_source


@click.group(cls=ProjectGroup, invoke_without_command=True)
@click.option("--recipe", default="demo", show_default=True, metavar="FILE|NAME")
@click.option("--images", default=500, show_default=True, help="Images to measure with, from the recipe's source.")
@click.option("--repeats", default=3, show_default=True, help="Measurements of each; the fastest counts.")
@set_option
def main(recipe: str, images: int, repeats: int, overrides: tuple[str, ...]) -> None:
    """Measure images/s of the bare model calls and of the whole per-shard job."""
    settings = load(recipe, overrides)
    classes = find_classes(settings.source.classes)[0]
    piece = plan_source(settings.source.data, classes, settings.source.shard_size).pieces[0]
    piece = replace(piece, count=min(images, piece.count))
    models = load_models(settings, classes)
    samples = [sample for sample in prepare(piece, settings, classes) if sample.clean is not None][: settings.batch]
    x, y, noise = _batch(samples, settings, models.device)
    discrete, _ = models.discretizer(x)
    stored = [encode_image(image, settings.output.image) for image in to_uint8(discrete).cpu()]

    def bare() -> None:
        with torch.no_grad():
            models.teacher(x)
        attack(x, y, models.teacher, models.discretizer, settings.attack, noise)
        with torch.no_grad():
            models.teacher(x)  # on x''
            models.teacher(x)  # on the attacked image, for the manifest

    def whole() -> None:
        with tempfile.TemporaryDirectory() as out:
            run_shard(0, piece, settings, classes, models, RunDir(out), "benchmark", lambda rows: None)

    def forward() -> None:
        with torch.no_grad():
            models.teacher(x)

    def discretize() -> None:
        with torch.no_grad():
            models.discretizer(x)

    parts: dict[str, tuple[Callable[[], object], int]] = {
        "Q, twice an image": (discretize, 2),
        "teacher forward, three times": (forward, 3),
        "teacher gradient, once a step": (lambda: loss_gradient(x, y, models.teacher), settings.attack.steps),
        "canvas, encode, decode": (lambda: list(prepare(replace(piece, count=len(samples)), settings, classes)), 1),
        "encode and decode x''": (lambda: [decode_image(encode_image(i, settings.output.image)) for i in to_uint8(x).cpu()], 1),
        "random start": (lambda: draw_noise([s.source.key for s in samples], x.shape[1:], settings.attack, settings.seed), 1),
    }
    with torch.no_grad():
        models.discretizer(to_float(torch.stack([decode_image(data) for data in stored])).to(models.device))  # warm-up
    bare_time = whole_time = float("inf")
    for _ in range(repeats):
        bare_time = min(bare_time, _seconds(bare, models.device) / len(samples))
        whole_time = min(whole_time, _seconds(whole, models.device) / piece.count)
    where = torch.cuda.get_device_name() if models.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    click.echo(f"{where}, recipe {recipe}, batch {settings.batch}, {settings.precision}")
    click.echo(f"bare model calls: {1 / bare_time:.1f} images/s")
    click.echo(f"whole job:        {1 / whole_time:.1f} images/s = {bare_time / whole_time:.2f} of the bare calls")
    for name, (part, times) in parts.items():
        seconds = times * min(_seconds(part, models.device) for _ in range(repeats)) / len(samples)
        click.echo(f"  {name:32s} {1000 * seconds:7.2f} ms an image, {seconds / whole_time:4.0%}")


def _batch(samples: list[Prepared], settings, device: torch.device):  # type: ignore[no-untyped-def]
    x = to_float(torch.stack([s.clean for s in samples if s.clean is not None])).to(device)
    y = torch.tensor([s.source.label for s in samples], device=device)
    noise = draw_noise([s.source.key for s in samples], x.shape[1:], settings.attack, settings.seed).to(device)
    return x, y, noise


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main(prog_name="python -m pipeline.benchmark")
