"""Stage 1 as one command: check, make the missing shards, seal. A second run does only what is missing."""

from __future__ import annotations

import importlib.metadata
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.compute as pc

from manifests import RunDir, RunInfo, Store, UserError
from manifests.claims import clear, forget, look
from manifests.notes import note
from manifests.progress import progress
from manifests.recipe import identity
from manifests.rundir import CARD, GALLERY, MANIFEST, RUN, count_statuses
from shards.sources import ImageSource
from shards.sources.classes import ClassList, find_classes, namesakes
from shards.sources.files import PIPE, common_extension, expand

from .card import dataset_card
from .job.batch import Row
from .job.models import Models, fingerprints, load_models, resolve_precision
from .job.worker import Work, unfinished, work_through
from .launchers import find_launcher
from .launchers.local import devices
from .recipe import Recipe, as_published, source_of
from .speed.batch_size import resolve_batch
from .status import Survey

PACKAGES = ("torch", "torchvision", "open_clip_torch", "taming-transformers", "timm", "pillow", "numpy", "pyarrow")


@dataclass(frozen=True)
class Job:
    """Everything that is known before the first image: what to make, with which models, and where."""

    recipe: Recipe
    classes: ClassList
    source: ImageSource
    models: Models | None  # None: workers load their own
    info: RunInfo
    out: RunDir


def prepare_job(recipe: Recipe, out: str) -> Job:
    """Check the recipe against files, device and OUT, cheapest first. Raises UserError for anything missing or unfit.

    If workers load the models, this process still reads their weights, for the fingerprints.
    """
    run = RunDir(out)
    run.check_place()
    here = recipe.launch.launcher == "local" and len(devices(recipe)) == 1
    classes, classes_fingerprint = find_classes(recipe.source.classes)
    if recipe.teacher.kind == "open_clip" and (same := namesakes(classes.names)):
        note(f"source.classes: the teacher cannot tell namesakes apart; a tie counts as the label: {same}")
    source = source_of(recipe, classes)
    refuse_inside(out, source, recipe.source.data)
    recipe = resolve_precision(recipe, run, devices(recipe)[0] if recipe.launch.launcher == "local" else None)
    models = load_models(recipe, classes) if here else None
    recipe = resolve_batch(recipe, run, models or _on_first_device(recipe, classes, run))
    models = models and replace(models, batch=recipe.batch)
    info = RunInfo(
        recipe=as_published(recipe),
        identity=identity(recipe),
        fingerprints=fingerprints(recipe, classes, models)
        | {"classes": classes_fingerprint, "source": source.fingerprint},
        classes=list(classes.names),
        shards=len(source.pieces),
        samples=source.samples,
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
    )
    return Job(recipe, classes, source, models, info, run)


def refuse_inside(out: str, source: ImageSource, data: str) -> None:
    """Raises UserError for an OUT that the next start would take for a part of its source.

    That is the folder of the source itself or, where its sub-folders are classes, a folder in it.
    """
    for folder in expand(data):
        if folder.startswith(PIPE) or common_extension([folder]) is not None:
            continue
        there, here = Store(folder), Store(out)
        if there.is_local and here.is_local:
            place, root = Path(here.root).resolve(), Path(there.root).resolve()
            within = place.is_relative_to(root) if source.kind == "ImageFolder" else place == root
        else:
            within = f"{here}/".startswith(f"{there}/") if source.kind == "ImageFolder" else str(here) == str(there)
        if within:
            raise UserError(f"{out}: lies in the source ({folder}), and would become a part of it; choose another OUT")


def _on_first_device(recipe: Recipe, classes: ClassList, run: RunDir) -> Models | None:
    """Models to find the batch size with; None if it is known already, or if the workers run elsewhere."""
    if recipe.batch or run.store.exists(RUN) or recipe.launch.launcher != "local":
        return None
    return load_models(replace(recipe, device=devices(recipe)[0]), classes)


def make_shards(recipe: Recipe, out: str, *, allow_missing: bool = False) -> None:
    """Make, or finish, the run directory ``out``. Several such commands, on several machines, share the work.

    Raises UserError when ``out`` holds another run, when shards could not be made (all others are then done, and sealed
    only if ``allow_missing``), or when more than ``max_errors`` of the samples failed (everything is then sealed).
    """
    find_launcher(recipe.launch.launcher)  # refuses a launcher that is not installed, before anything is written
    job = prepare_job(recipe, out)
    job.out.begin(job.info)
    job.out.store.remove_stale_temporaries()
    sound = sound_shards(job.out, job.info, job.out.shards_with_parts())
    todo = tuple(shard for shard in range(job.info.shards) if shard not in sound)
    if todo:
        _record_versions(job)
    work = Work(recipe=job.recipe, out=out, run=job.info.fingerprint, todo=todo, pieces=job.source.pieces)
    missing: dict[int, str] = {}
    if todo or not job.out.store.exists(GALLERY):
        where = f"on {job.models.device.type}" if job.models else f"by {recipe.launch.launcher} workers"
        click.echo(
            f"{out}: {len(todo)} of {job.info.shards} shards to make, {job.source.samples:,} images in all, {where}"
        )
        missing = _make_missing(job, work, sum(job.source.pieces[shard].count for shard in sound))
    if missing and (not allow_missing or len(missing) == job.info.shards):
        fix = "all others are done; run the same command again, or seal without them with --allow-missing"
        raise UserError(_describe(job, missing, fix))
    if todo or not _sealed(job):
        seal(job, missing)
    if not missing:
        clear(job.out.store)
    else:
        note(_describe(job, missing, f"sealed without them, as {RUN} records"))
    _conclude(job)


def seal(job: Job, missing: Mapping[int, str]) -> None:
    """Write manifest.parquet, run.json and the dataset card. missing: shards not made, with the reason."""
    job.out.store.remove(CARD)  # the card is written last: without it, sealing is repeated
    shards = [shard for shard in range(job.info.shards) if shard not in missing]
    table, tars = job.out.seal(replace(job.info, versions=job.out.info().versions), shards, missing)
    job.out.store.write(CARD, dataset_card(job.out.info(), table, tars).encode())
    # found here, because large sources are not read key by key before the run
    if repeated := table.num_rows - pc.count_distinct(table.column("key")).as_py():
        fix = "source.keys=place tells them apart (but labels-only shards then match no images)"
        note(f"source.data: {repeated} keys occur more than once; {fix}")


def _record_versions(job: Job) -> None:
    """Note and record package versions that differ from those that the run began with."""
    before = job.out.info()
    known = {name: before.versions.get(name, now) for name, now in job.info.versions.items()}
    changed = {
        name: f"{known[name]} and {now}"
        for name, now in job.info.versions.items()
        if now not in known[name].split(" and ")
    }
    if changed:
        differences = ", ".join(f"{name} {known[name]}, now {job.info.versions[name]}" for name in changed)
        note(f"{job.out}: began with {differences}: shards made now may differ from the older ones in their last bits")
        job.out.write_info(replace(before, versions=known | changed))


def sound_shards(out: RunDir, info: RunInfo, candidates: Iterable[int]) -> set[int]:
    """Find the sound shards by reading every byte. The others lose their part file, so that they are made anew."""
    shards, sound = sorted(candidates), set()
    with ThreadPoolExecutor(8) as pool, progress(len(shards), "checking", "shard", quick=True) as bar:
        for shard, why in zip(shards, pool.map(lambda shard: out.damage(shard, info.fingerprint), shards), strict=True):
            bar.update()
            if why is None:
                sound.add(shard)
            else:
                out.withdraw(shard)
                click.echo(f"shard {shard} is made anew: {why}", err=True)
    return sound


def _make_missing(job: Job, work: Work, done: int) -> dict[int, str]:
    """Run workers until every shard of the work is sound or given up; returns the missing shards, with the reason.

    done: number of samples in the shards that were there before.
    """
    for shard in look(job.out.store).failed:  # failures of earlier commands do not count: every command tries anew
        forget(job.out.store, shard)
    missing: dict[int, str] = {}
    while True:
        _run_workers(job, work, done)
        left, given_up = unfinished(work, job.out)
        missing |= {shard: f"failed {failure.tries} times: {failure.reason}" for shard, failure in given_up.items()}
        missing |= dict.fromkeys(left, "no worker was left to make it")
        # read every shard back once: two workers at one shard may have mixed their files
        made = set(work.todo) - missing.keys()
        work = replace(work, todo=tuple(sorted(made - sound_shards(job.out, job.info, made))))
        if not work.todo:
            return missing


def _run_workers(job: Job, work: Work, done: int) -> None:
    with progress(job.source.samples, "generating", "img", initial=done) as bar:

        def show(counts: Mapping[str, int], samples: int) -> None:
            judged = counts["verified"] + counts["rejected"]
            if judged:
                bar.set_postfix_str(f"{100 * counts['verified'] / judged:.0f}% verified", refresh=False)
            bar.update(max(samples, 0))

        if job.models is not None:
            counts: Counter[str] = Counter()

            def report(rows: list[Row]) -> None:
                counts.update(row["status"] for row in rows)
                show(counts, len(rows))

            work_through(work, models=job.models, report=report)
            return
        survey = Survey(job.out)

        def watch() -> int:
            state = survey.look()
            show(state.counts, state.counts.total() - int(bar.n))
            return len(state.done)

        find_launcher(work.recipe.launch.launcher)(work, watch)
        watch()


def _describe(job: Job, missing: Mapping[int, str], consequence: str) -> str:
    first = min(missing)
    count = f"{len(missing)} of {job.info.shards} shards could not be made"
    return f"{job.out}: {count}, the first {first}: {missing[first]}; {consequence}"


def _sealed(job: Job) -> bool:
    """Whether the manifest has the rows of all part files; a command killed before it sealed may have added some."""
    store = job.out.store
    if not all(store.exists(name) for name in (MANIFEST, CARD)):
        return False
    try:
        table, tars = job.out.manifest()
    except UserError as error:
        click.echo(f"sealing again: {error}", err=True)
        return False
    rows, recorded = job.out.read_parts(range(job.info.shards))
    if job.out.info().missing or tars != recorded or not table.equals(rows):
        click.echo(f"sealing again: {job.out}: shards were made after it was sealed", err=True)
        return False
    return True


def _conclude(job: Job) -> None:
    info = job.out.info()
    counts = info.counts or {}
    click.echo(f"{job.out}: sealed, {info.samples:,} samples: {count_statuses(counts)}")
    look_at = f"look at {job.out.store.where(GALLERY)}; " if job.out.store.exists(GALLERY) else ""
    click.echo(f"{look_at}check with: python -m pipeline verify {job.out}")
    table, _ = job.out.manifest(["key", "label", "status", "reason", "clean_pred"], info)
    errors = counts.get("error", 0)
    if errors:
        first = _first_error(table)
        line = f"{errors} of {info.samples} samples failed, the first {first['key']!r}: {first['reason']}"
        if errors > job.recipe.max_errors * info.samples:
            raise UserError(
                f"{job.out}: {line}; that is more than max_errors = {job.recipe.max_errors:.1%}. "
                "The rest is sealed and usable; mend the source, or raise max_errors"
            )
        note(f"{line} (status 'error' in {MANIFEST})")
    judged = table.filter(pc.is_valid(table.column("clean_pred")))
    hits = pc.sum(pc.equal(judged.column("label"), judged.column("clean_pred"))).as_py() or 0
    if near_chance(hits, judged.num_rows, len(info.classes)):
        note(
            f"the teacher sees the label on {hits / judged.num_rows:.1%} of the clean images; guessing would on "
            f"{1 / len(info.classes):.1%}. Check that the labels follow source.classes, and check teacher.weights"
        )


def near_chance(hits: int, judged: int, classes: int) -> bool:
    """Whether a teacher with ``hits`` right answers surely lies below 1/20 of the way from guessing to perfect.

    Surely means by four standard deviations, so fewer than 300 samples (of many classes) never suffice.
    """
    share = 1 / classes + (1 - 1 / classes) / 20
    return hits < judged * share - 4 * math.sqrt(judged * share * (1 - share))


def _first_error(table: pa.Table) -> dict[str, Any]:
    index = table.column("status").to_pylist().index("error")
    row: dict[str, Any] = table.slice(index, 1).to_pylist()[0]
    return row
