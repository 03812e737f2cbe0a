"""Stage 1 as one command: plan, make the missing shards, seal. Running it again does only what is missing."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from dataclasses import dataclass
from typing import Any

import click
import pyarrow as pa

from manifests import RunDir, RunInfo, UserError
from manifests.progress import progress
from manifests.recipe import apply_overrides, as_tree, identity, make_recipe
from manifests.rundir import MANIFEST, RUN, count_statuses, part_name

from .batch_job import Row
from .card import CARD, dataset_card
from .classes import ClassList, find_classes
from .gallery import GALLERY, make_gallery
from .models import Models, load_models
from .recipe import Recipe
from .shard_job import run_shard
from .sources import SourcePlan, plan_source

PACKAGES = ("torch", "torchvision", "open_clip_torch", "taming-transformers", "timm", "pillow", "numpy", "pyarrow")


@dataclass(frozen=True)
class Job:
    """Everything that is known before the first image: what to make, with what, and where."""

    recipe: Recipe
    classes: ClassList
    plan: SourcePlan
    models: Models
    info: RunInfo
    out: RunDir


def prepare_job(recipe: Recipe, out: str) -> Job:
    """Check the recipe against the world, cheapest first. Raises UserError for whatever is missing or does not fit."""
    run = RunDir(out)
    classes, classes_fingerprint = find_classes(recipe.source.classes)
    plan = plan_source(recipe.source.data, classes, recipe.source.shard_size, recipe.source.keys)
    models = load_models(recipe, classes)
    info = RunInfo(
        recipe=as_tree(recipe),
        identity=identity(recipe),
        fingerprints=models.fingerprints() | {"classes": classes_fingerprint, "source": plan.fingerprint},
        classes=list(classes.names),
        shards=len(plan.pieces),
        samples=plan.samples,
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
    )
    return Job(recipe, classes, plan, models, info, run)


def make_shards(recipe: Recipe, out: str) -> None:
    """Make, or finish, the run directory ``out``.

    Raises UserError when ``out`` holds another run, or when more than ``max_errors`` of the samples failed (everything
    else is then done and sealed).
    """
    job = prepare_job(recipe, out)
    job.out.claim(job.info)
    job.out.store.remove_stale_temporaries()
    todo, done = _missing(job)
    counts: Counter[str] = Counter()
    if todo:
        where = job.models.device.type
        click.echo(f"{out}: {len(todo)} of {job.info.shards} shards to make, {job.plan.samples:,} images in all, on {where}")
    with progress(job.plan.samples, "generating", "img", initial=done) as bar:

        def report(rows: list[Row]) -> None:
            counts.update(row["status"] for row in rows)
            judged = counts["verified"] + counts["rejected"]
            if judged:
                bar.set_postfix_str(f"{100 * counts['verified'] / judged:.0f}% verified", refresh=False)
            bar.update(len(rows))

        for shard in todo:
            run_shard(shard, job.plan.pieces[shard], recipe, job.classes, job.models, job.out, job.info.fingerprint, report)
    if todo or not _sealed(job):
        seal(job)
    _conclude(job)


def seal(job: Job) -> None:
    """Write manifest.parquet, run.json, the dataset card and the gallery of a complete run."""
    store = job.out.store
    table, tars = job.out.seal(job.info, range(job.info.shards))
    store.write(CARD, dataset_card(job.out.info(), table, tars).encode())
    store.write(GALLERY, make_gallery(table, job.plan.pieces[0], job.recipe, job.classes, job.models))


def _missing(job: Job) -> tuple[list[int], int]:
    """Shards to make, and how many samples the finished ones hold. Names those that were done once and are damaged now."""
    todo, done = [], 0
    for shard, piece in enumerate(job.plan.pieces):
        why = job.out.damage(shard, job.info.fingerprint)
        if why is None:
            done += piece.count
            continue
        todo.append(shard)
        if job.out.store.exists(part_name(shard)):
            click.echo(f"shard {shard} is made anew: {why}", err=True)
    return todo, done


def _sealed(job: Job) -> bool:
    store = job.out.store
    if not all(store.exists(name) for name in (MANIFEST, CARD, GALLERY)):
        return False
    try:
        job.out.manifest()
    except UserError as error:
        click.echo(f"sealing again: {error}", err=True)
        return False
    return True


def _conclude(job: Job) -> None:
    info = job.out.info()
    counts = info.counts or {}
    click.echo(f"{job.out}: sealed, {info.samples:,} samples: {count_statuses(counts)}")
    click.echo(f"look at {job.out.store.where(GALLERY)}; check with: python -m pipeline verify {job.out}")
    errors = counts.get("error", 0)
    if errors:
        table, _ = job.out.manifest()
        first = _first_error(table)
        line = f"{errors} of {info.samples} samples failed, the first {first['key']!r}: {first['reason']}"
        if errors > job.recipe.max_errors * info.samples:
            raise UserError(
                f"{job.out}: {line}; that is more than max_errors = {job.recipe.max_errors:.1%}. "
                "The rest is sealed and usable; mend the source, or raise max_errors"
            )
        click.echo(f"note: {line} (status 'error' in {MANIFEST})", err=True)


def _first_error(table: pa.Table) -> dict[str, Any]:
    index = table.column("status").to_pylist().index("error")
    row: dict[str, Any] = table.slice(index, 1).to_pylist()[0]
    return row


def recipe_of(run: RunDir, overrides: tuple[str, ...]) -> tuple[Recipe, ClassList]:
    """The recipe that a run was made with, with overrides (for paths that differ here), and its class list."""
    tree = apply_overrides(run.info().recipe, overrides)
    recipe = make_recipe(Recipe, tree, run.store.where(RUN))
    return recipe, find_classes(recipe.source.classes)[0]
