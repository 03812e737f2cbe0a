"""Speed of stage 1 on this machine, measured in one run (``make bench-generate``).

It measures the bare model calls, the whole job, the device's matrix rate, the official algorithm's loop, and each part.
With ``--weights random`` it needs neither weights nor images, so the paper's full-size models can be measured anywhere.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from manifests import RunDir
from manifests.command import ProjectGroup, set_option
from shards import decode_image, encode_image
from shards.sources import Piece, SourceSample
from shards.sources.classes import ClassList, find_classes
from shards.sources.folder import FolderPiece

from ..job.models import Models, load_models
from ..job.prepare import prepare_sample
from ..job.shard import run_shards
from ..recipe import Recipe, load, source_of
from .batch_size import find_batch
from .measure import TrialBatch, bare_calls, busy_share, count_flops, device_name, matrix_rate, model_parts, timed
from .reference import reference_batch

RANDOM = ("teacher.weights=random", "discretizer.weights=random")
PICTURE = (500, 375)  # pixels of a random picture: ImageNet's mean size, about 110 kB


@dataclass(frozen=True)
class First:
    """The first ``count`` samples of a piece."""

    piece: Piece
    count: int

    @property
    def name(self) -> str:
        return self.piece.name

    def samples(self, classes: ClassList) -> Iterator[SourceSample]:
        return itertools.islice(self.piece.samples(classes), self.count)


@click.group(
    cls=ProjectGroup,
    invoke_without_command=True,
    subcommand_metavar="",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--recipe", default="demo", show_default=True, metavar="FILE|NAME")
@click.option(
    "--weights",
    type=click.Choice(["recipe", "random"]),
    default="recipe",
    show_default=True,
    help="random: needs no files.",
)
@click.option(
    "--images",
    default=500,
    show_default=True,
    help="Images to measure with, from the recipe's source (random ones with --weights random).",
)
@click.option("--repeats", default=3, show_default=True, help="Number of measurements of each; the fastest counts.")
@click.option("--reference/--no-reference", default=True, help="Time the official algorithm's loop too.")
@click.option(
    "--agreement", is_flag=True, help="Also measure how often bf16 and fp32 give the same codes and verdicts."
)
@set_option
def main(
    recipe: str, weights: str, images: int, repeats: int, reference: bool, agreement: bool, overrides: tuple[str, ...]
) -> None:
    """Measure images/s, TFLOP/s and where the time goes."""
    with tempfile.TemporaryDirectory() as folder:
        if weights == "random":
            overrides = (*overrides, *RANDOM, f"source.data={folder}")
        settings = load(recipe, overrides)
        classes, _ = find_classes(settings.source.classes)
        if weights == "random":
            piece: Piece = made_up_piece(Path(folder), min(images, 64), images)
        else:
            source = source_of(settings, classes)
            piece = First(source.pieces[0], min(images, source.pieces[0].count))
        models = load_models(settings, classes)
        settings = replace(settings, batch=settings.batch or find_batch(settings, models))
        models = replace(models, batch=settings.batch)
        _report(recipe, settings, classes, models, piece, repeats, reference=reference)
        if agreement:
            _report_agreement(settings, classes, models, piece)


def made_up_piece(folder: Path, files: int, count: int) -> Piece:
    """Make ``count`` samples from ``files`` different JPEGs of smooth noise, at the size of a photograph."""
    rng = np.random.default_rng(0)
    for i in range(files):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
            PICTURE, Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse, np.int16) + rng.integers(-34, 35, (*PICTURE[::-1], 3), dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
    # links to the same file have names of their own, so that their keys differ
    for n in range(files, count):
        (folder / f"{n}.jpg").symlink_to(folder / f"{n % files}.jpg")
    return FolderPiece(root=str(folder), name="made up", files=tuple((f"{n}.jpg", 0) for n in range(count)))


def _report(
    recipe: str, settings: Recipe, classes: ClassList, models: Models, piece: Piece, repeats: int, *, reference: bool
) -> None:
    device = models.device
    sources, pixels = _first_batch(piece, settings, classes)
    batch = TrialBatch.of(pixels, settings, models)
    parts = model_parts(batch, settings, models)
    flops = {part.name: part.times * count_flops(part.call) / len(batch) for part in parts}  # also warms up

    def whole() -> None:
        with tempfile.TemporaryDirectory() as out:
            for _, outcome in run_shards(
                [(0, piece)], settings, classes, models, RunDir(out), "benchmark", lambda shard, rows: None
            ):
                if isinstance(outcome, Exception):
                    raise outcome

    original = models.teacher_model, models.discretizer_model  # eager, and float32 without autocast
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, tuple[Callable[[], object], int]] = {
            "bare": (lambda: bare_calls(batch, settings, models), len(batch)),
            "whole": (whole, piece.count),
        }
        if reference:
            runs["reference"] = (lambda: reference_batch(batch.x, batch.y, *original, Path(folder)), len(batch))
        best = {name: min(timed(run, device) for _ in range(repeats)) / images for name, (run, images) in runs.items()}
    rate = matrix_rate(device, bf16=models.bf16)
    total = sum(flops.values())
    number_format = "bf16" if models.bf16 else "fp32"
    click.echo(
        f"{device_name(device)}, recipe {recipe}, batch {settings.batch}, {number_format}, torch {torch.__version__}"
    )
    click.echo(f"bare model calls: {1 / best['bare']:8.2f} images/s")
    click.echo(
        f"whole job:        {1 / best['whole']:8.2f} images/s = {best['bare'] / best['whole']:.2f} of the bare calls"
    )
    done = total / best["whole"]
    click.echo(f"                  {done / 1e12:8.2f} TFLOP/s = {done / rate:.2f} of this device's matrix rate")
    click.echo(f"matrix rate:      {rate / 1e12:8.2f} TFLOP/s ({number_format}); {total / 1e9:,.1f} GFLOP an image")
    if reference:
        times = best["reference"] / best["whole"]
        click.echo(
            f"official loop:    {1 / best['reference']:8.2f} images/s; the whole job is {times:.1f} times as fast"
        )
    if (share := busy_share(whole, device)) is not None:
        click.echo(f"GPU idle share of the whole job: {1 - share:.1%}")
    rows = [
        (f"{part.name}, {part.times} times", part.times * _fastest(part.call, device, repeats), flops[part.name])
        for part in parts
    ]
    encode = lambda: [decode_image(encode_image(image, settings.output.image)) for image in pixels]  # noqa: E731
    rows += [
        (
            "on CPU threads: canvas, codec, noise",
            _fastest(lambda: [prepare_sample(s, settings) for s in sources], device, repeats),
            0.0,
        ),
        ("on CPU threads: codec of x''", _fastest(encode, device, repeats), 0.0),
    ]
    for name, seconds, work in rows:
        each = seconds / len(batch)
        speed = f", {work / each / 1e12:7.2f} TFLOP/s, {work / 1e9:8.1f} GFLOP" if work else ""
        click.echo(f"  {name:38s} {1000 * each:8.2f} ms an image, {each / best['whole']:4.0%} of the whole{speed}")


def _first_batch(piece: Piece, settings: Recipe, classes: ClassList) -> tuple[list[SourceSample], torch.Tensor]:
    """The first samples of a piece, and the readable ones on the canvas, uint8 [B, 3, S, S]."""
    sources = list(itertools.islice(piece.samples(classes), settings.batch))
    prepared = [prepare_sample(sample, settings) for sample in sources]
    return sources, torch.stack([sample.clean for sample in prepared if sample.clean is not None])


def _report_agreement(settings: Recipe, classes: ClassList, models: Models, piece: Piece) -> None:
    """Compare bf16 with fp32 on the same images: codes of Q(x), and the verdicts of the whole method."""
    found: list[dict[str, str]] = []
    codes: list[torch.Tensor] = []
    for bf16 in (True, False):
        one = replace(models, bf16=bf16, compiled=None)
        with tempfile.TemporaryDirectory() as out:
            ((_, rows),) = run_shards(
                [(0, piece)], settings, classes, one, RunDir(out), "agreement", lambda shard, rows: None
            )
        if isinstance(rows, Exception):
            raise rows
        found.append({row["key"]: row["status"] for row in rows})
        _, pixels = _first_batch(piece, settings, classes)
        with torch.no_grad():
            codes.append(one.discretizer(TrialBatch.of(pixels, settings, one).x)[1])
    same = sum(found[0][key] == found[1][key] for key in found[0]) / len(found[0])
    equal = (codes[0] == codes[1]).float().mean().item() if codes[0].numel() else float("nan")
    click.echo(
        f"bf16 and fp32 agree on {same:.1%} of {len(found[0])} verdicts, and on {equal:.1%} of the codes of Q(x)"
    )


def _fastest(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    return min(timed(call, device) for _ in range(repeats))


if __name__ == "__main__":
    main(prog_name="python -m pipeline.speed.benchmark")
