"""Checking a run directory: every checksum and count, and the teacher's answer on random samples once more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from manifests import RunDir, RunInfo, UserError
from manifests.devices import must_fit
from manifests.progress import progress
from manifests.rows import TarRecord
from manifests.rundir import RUN, count_statuses
from shards import LabelledImage, ShardDataset, iterate_tar, view_images
from shards.codec import to_float

from .job.models import Models, load_models
from .method.discretizer import Discretizer
from .method.teacher import announce_teacher, weights_fingerprint
from .recipe import recipe_of
from .speed.batch_size import ON_CPU

# Largest difference of a logit that recomputing may show, relative to the sample's largest logit. The machine that made
# the shards shows the rounding to float16 (2^-11); another kind sums in another order: some such steps, or one of bf16.
TOLERANCE = {"fp32": 2**-9, "bf16": 2**-7}


def problems(out: str) -> Iterator[str]:
    """Everything in a run directory that is not as recorded, one line each, naming the file.

    Raises UserError when there is no run.
    """
    run = RunDir(out)
    info = run.info()
    found = False
    shards = [shard for shard in range(info.shards) if str(shard) not in (info.missing or {})]
    with progress(len(shards), "verifying", "shard") as bar:
        for shard in shards:
            for line in _shard_problems(run, info, shard):
                found = True
                yield line
            bar.update()
    if found:
        return  # the sealed manifest can only repeat what is wrong
    try:
        table, tars = run.manifest()
    except UserError as error:
        yield str(error)
        return
    rows, recorded = run.read_parts(shards)
    if not table.equals(rows):
        yield f"{run.store.where('manifest.parquet')}: its rows are not those of the part files"
    if tars != recorded:
        yield f"{run.store.where('manifest.parquet')}: its list of tars is not that of the part files"
    counts = Counter(table.column("status").to_pylist())
    if info.counts != dict(counts):
        said, found_counts = count_statuses(info.counts or {}), count_statuses(counts)
        yield f"{run.store.where(RUN)}: says {said}, the manifest holds {found_counts}"
    known = {tar.name for tar in tars}
    for stream in ("clean", "dad"):
        for name in run.store.names(stream):
            if f"{stream}/{name}" not in known:
                where = run.store.where(f"{stream}/{name}")
                yield f"{where}: not in the manifest; remove it, or readers that list folders will use it"


def reinfer(out: str, count: int, seed: int, overrides: tuple[str, ...]) -> Iterator[str]:
    """Ask the teacher again about ``count`` random samples of each stream: label and logits must be the stored ones.

    ``seed`` draws the samples, so that a failure can be repeated.
    """
    run = RunDir(out)
    info = run.info()
    recipe, classes = recipe_of(run, overrides)
    announce_teacher(recipe.teacher, run.store.where(RUN), overrides)
    models = load_models(
        replace(recipe, discretizer=Discretizer(kind="identity")), classes
    )  # the teacher alone is asked
    if (now := weights_fingerprint(models.teacher_model)) != info.fingerprints["teacher"]:
        raise UserError(
            f"teacher.model: this is not the teacher that labelled {out} "
            f"(fingerprint {now}, recorded {info.fingerprints['teacher']}); "
            "name the right one with --set teacher.model=…"
        )
    tolerance = TOLERANCE[recipe.precision]
    for stream in ("clean", "dad") if recipe.output.clean_images else ("dad",):
        dataset = ShardDataset(out, stream)  # type: ignore[arg-type]
        chosen = np.random.default_rng(seed).choice(len(dataset), size=min(count, len(dataset)), replace=False)
        views = [view for index in chosen for view in _views(dataset[int(index)])]
        size = recipe.batch if models.device.type == "cuda" else min(recipe.batch, ON_CPU)
        for start in range(0, len(views), size):
            part = views[start : start + size]
            for view, found in zip(part, _infer([view.image for view in part], models, size), strict=True):
                kept = view.logits.topk(recipe.views.topk or len(found)).indices  # what a top-k record holds
                stored, again = view.logits[kept], found[kept]
                difference = float((again - stored).abs().max() / stored.abs().max())
                if not difference <= tolerance:  # NaN fails too
                    differ = f"logits differ by {difference:.2%} of the largest from the stored ones"
                    yield f"{out}: {stream} sample {view.name}: {differ}"
                sees, saw = int(found.argmax()), int(view.logits.argmax())
                if sees != saw and _margin(stored) > 2 * tolerance:
                    yield f"{out}: {stream} sample {view.name}: the teacher now sees class {sees}, not {saw}"
                if stream == "dad" and view.whole and saw != view.label:
                    yield f"{out}: dad sample {view.name}: stored logits say class {saw}, its label is {view.label}"


@dataclass(frozen=True)
class _View:
    """A view of a stored sample, and its soft label."""

    name: str
    label: int
    image: torch.Tensor  # uint8 [3, H, W]
    logits: torch.Tensor  # float32 [classes]
    whole: bool  # the canvas, on which the sample was verified


def _views(sample: LabelledImage) -> Iterator[_View]:
    if sample.image is None:
        return
    if sample.views is None:
        yield _View(sample.key, sample.label, sample.image, sample.logits.float(), whole=True)
        return
    for number, (image, logits) in enumerate(
        zip(view_images(sample.image, sample.views), sample.logits.float(), strict=True)
    ):
        yield _View(f"{sample.key}, view {number}", sample.label, image, logits, whole=False)


def _infer(images: list[torch.Tensor], models: Models, batch: int) -> torch.Tensor:
    """The teacher's logits. On a GPU the batch is filled up to the size of stage 1: another size may sum differently.

    On a CPU a full batch of a GPU's would take minutes, and `TOLERANCE` allows for the difference.
    """
    count = batch if models.device.type == "cuda" else len(images)
    filled = [images[i % len(images)] for i in range(count)]
    with torch.no_grad(), must_fit(f"batch: {batch} images do not fit into memory; lower it with --set batch=N"):
        return models.teacher(to_float(torch.stack(filled)).to(models.device)).cpu()[: len(images)]


def _margin(logits: torch.Tensor) -> float:
    if len(logits) < 2:
        return 0.0
    first, second = logits.topk(2).values.tolist()
    return float((first - second) / logits.abs().max())


def _shard_problems(run: RunDir, info: RunInfo, shard: int) -> Iterator[str]:
    if why := run.damage(shard, info.fingerprint):
        yield why
        return
    table, record = run.part(shard)
    for tar in record.tars:
        yield from _tar_problems(run, tar, table)


def _tar_problems(run: RunDir, tar: TarRecord, table: pa.Table) -> Iterator[str]:
    """Counts, keys and labels of one tar against the rows of its shard."""
    where, stream = run.store.where(tar.name), tar.name.partition("/")[0]
    rows = [row for row in table.to_pylist() if row[f"{stream}_offset"] is not None]
    with run.store.open(tar.name) as file:
        samples = list(iterate_tar(file, where))
    if not len(samples) == len(rows) == tar.samples:
        yield f"{where}: holds {len(samples)} samples, its rows {len(rows)}, its record says {tar.samples}"
        return
    for (offset, sample), row in zip(samples, rows, strict=True):
        if sample.key != row["key"] or offset != row[f"{stream}_offset"]:
            expected = f"the manifest expects {row['key']} at {row[f'{stream}_offset']}"
            yield f"{where}: sample {sample.key} at byte {offset}, {expected}"
        elif sample.members.get("cls") != str(row["label"]).encode():
            found = sample.members.get("cls")
            yield f"{where}: sample {sample.key} has label {found!r}, the manifest says {row['label']}"
        if stream == "dad" and row["status"] != "verified":
            yield f"{where}: sample {sample.key} is {row['status']}, only verified samples belong here"


def summary(out: str) -> str:
    info = RunDir(out).info()
    without = f"; {len(info.missing)} of {info.shards} shards are missing with leave, see {RUN}" if info.missing else ""
    return f"{out}: every checksum, count, key and label is as recorded ({count_statuses(info.counts or {})}){without}"
