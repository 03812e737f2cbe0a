"""The per-shard job: one piece of the source in, two tars and a part file out. The result depends on nothing else.

`run_shards` makes one shard after the other and keeps the models busy in between: three batches are in flight, samples
of the next are read and decoded, and finished shards are written, all at the same time. Batches never cross shards and
keep the order of the source, so a repeated shard repeats its bytes.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from manifests import RunDir, UserError
from manifests.devices import usable_cores
from shards import TarWriter
from shards.codec import encode_array
from shards.prefetch import Prefetch, map_in_order
from shards.sources import Piece
from shards.sources.classes import ClassList
from shards.views import soft_label_members

from ..recipe import Recipe
from .batch import AttackedBatch, JudgedBatch, JudgedSample, Row, attack_batch, collect, judge_batch
from .models import Models
from .prepare import Prepared, batches, prepare_sample

Report = Callable[[int, list[Row]], None]  # (shard, rows of a batch that is done)
BATCHES_AHEAD = 2
FLUSH = (None, None)  # push the batches in flight through the remaining two stages


@dataclass
class _Shard:
    """A shard that is being made."""

    number: int
    piece: Piece
    rows: list[Row] = field(default_factory=list)
    clean: TarWriter = field(default_factory=TarWriter)
    dad: TarWriter = field(default_factory=TarWriter)
    keys: set[str] = field(default_factory=set)
    error: Exception | None = None


@dataclass
class _Batch:
    """A batch on its way through the stages; without samples it marks the end of its shard."""

    shard: _Shard
    samples: list[Prepared]
    state: AttackedBatch | JudgedBatch | None = None


def run_shard(
    shard: int,
    piece: Piece,
    recipe: Recipe,
    classes: ClassList,
    models: Models,
    out: RunDir,
    run: str,
    report: Callable[[list[Row]], None],
) -> list[Row]:
    """Make one shard and commit it: clean tar, DAD tar, and last its part file. Returns the rows.

    run: fingerprint of the run. report: called with the rows of every finished batch.
    Raises UserError for a damaged source.
    """
    ((_, outcome),) = run_shards([(shard, piece)], recipe, classes, models, out, run, lambda _, rows: report(rows))
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def run_shards(
    work: Iterable[tuple[int, Piece] | None],
    recipe: Recipe,
    classes: ClassList,
    models: Models,
    out: RunDir,
    run: str,
    report: Report,
) -> Iterator[tuple[int, list[Row] | Exception]]:
    """Make shards and commit each; yields (shard, its rows or its error) in the order of the work.

    work: (shard, piece), drawn shortly before it is needed. None means that no shard is free now: the batches in flight
    go on, and are finished when nothing else is left to read. A shard that fails does not stop the others.
    """
    threads = recipe.codec_threads or max(1, min(16, usable_cores() // 2))
    with contextlib.ExitStack() as stack:
        readers, codec, writer = (
            _pool(stack, count, name) for count, name in ((threads, "decode"), (threads, "encode"), (1, "write"))
        )
        stages: tuple[Callable[[_Batch], None], ...] = (
            partial(_attack, recipe=recipe, models=models, codec=codec),
            partial(_judge, models=models),
            partial(_collect, recipe=recipe, report=report),
        )
        flight: list[_Batch | None] = [None] * len(stages)  # flight[n] is at stage n
        written: deque[tuple[_Shard, Future[list[Row]]]] = deque()
        for batch in _all_batches(work, recipe, classes, readers, stack):
            # newest batch first: on a GPU its attack runs while the CPU waits for the codec of the batch before it
            flight = [batch, *flight[:-1]]
            for stage, at in zip(stages, flight, strict=True):
                if at is not None and at.samples:
                    _advance(stage, at)
            if (last := flight[-1]) is not None and not last.samples:
                written.append((last.shard, writer.submit(_commit, last.shard, out, run)))
            while written and (batch is None or len(written) > 1 or written[0][1].done()):
                shard, future = written.popleft()
                error = future.exception()
                yield shard.number, future.result() if error is None else _plain(error)


def _all_batches(
    work: Iterable[tuple[int, Piece] | None],
    recipe: Recipe,
    classes: ClassList,
    pool: Executor,
    stack: contextlib.ExitStack,
) -> Iterator[_Batch | None]:
    """Batches of all shards. An empty batch ends a shard; None asks the caller to finish what is in flight.

    The next piece is opened as soon as the one before it has been read to its end, before its last batches are yielded.
    """
    pieces, more = iter(work), True
    feeds: deque[tuple[_Shard, Prefetch[list[Prepared]]]] = deque()

    def close() -> None:
        for _, feed in feeds:
            feed.close()

    stack.callback(close)
    while more or feeds:
        if more and (not feeds or (len(feeds) == 1 and feeds[0][1].exhausted)):
            entry = next(pieces, False)
            more = entry is not False
            if isinstance(entry, tuple):
                shard = _Shard(*entry)
                samples = map_in_order(
                    pool, partial(prepare_sample, recipe=recipe), shard.piece.samples(classes), 2 * recipe.batch
                )
                feeds.append((shard, Prefetch(batches(samples, recipe.batch), BATCHES_AHEAD)))
            elif not feeds:
                yield from FLUSH
        if feeds:
            shard, feed = feeds[0]
            batch = _next_batch(shard, feed)
            if not batch:
                feed.close()
                feeds.popleft()
            yield _Batch(shard, batch)
    yield from FLUSH


def _next_batch(shard: _Shard, feed: Prefetch[list[Prepared]]) -> list[Prepared]:
    """The shard's next batch; empty at its end and after a failure."""
    try:
        return [] if shard.error else next(feed, [])
    except Exception as error:
        shard.error = error
        return []


def _advance(stage: Callable[[_Batch], None], batch: _Batch) -> None:
    if batch.shard.error is None:
        try:
            stage(batch)
        except Exception as error:
            # the frames hold the batch's tensors: the next batch would not fit the device either
            traceback.clear_frames(error.__traceback__)
            batch.shard.error = error


def _attack(batch: _Batch, recipe: Recipe, models: Models, codec: Executor) -> None:
    if usable := [sample for sample in batch.samples if sample.clean is not None]:
        batch.state = attack_batch(usable, recipe, models, codec)


def _judge(batch: _Batch, models: Models) -> None:
    if isinstance(batch.state, AttackedBatch):
        batch.state = judge_batch(batch.state, models)


def _collect(batch: _Batch, recipe: Recipe, report: Report) -> None:
    judged = iter(collect(batch.state) if isinstance(batch.state, JudgedBatch) else [])
    shard, batch.state = batch.shard, None
    rows = [_add(sample, None if sample.clean is None else next(judged), shard, recipe) for sample in batch.samples]
    shard.rows.extend(rows)
    report(shard.number, rows)


def _add(sample: Prepared, judged: JudgedSample | None, shard: _Shard, recipe: Recipe) -> Row:
    """Add a sample to the clean tar and, if verified, to the DAD tar; returns its row. judged: None if unusable."""
    key, label = sample.source.key, str(sample.source.label).encode()
    row: Row = {"key": key, "shard": shard.number, "label": sample.source.label}
    if judged is None:
        reason = str(sample.problem).encode("utf-8", "replace").decode()  # file names of a source need not be UTF-8
        return row | {"status": "error", "reason": reason}
    row |= judged.row
    if key in shard.keys:
        row |= {"status": "error", "reason": "the key occurs twice in the shard; set source.keys=place"}
    if row["status"] == "error":
        return row
    shard.keys.add(key)
    image = recipe.output.image.format
    members = {"cls": label, **_soft_labels(judged.clean_soft_labels, sample, recipe)}
    if recipe.output.clean_images:
        members = {image: sample.clean_bytes} | members
    extent = shard.clean.add(key, members)
    row |= {"clean_offset": extent.offset, "clean_size": extent.size, "clean_crc32": extent.crc32}
    if row["status"] == "verified":
        members = {image: judged.image, "cls": label, **_soft_labels(judged.dad_soft_labels, sample, recipe)}
        if recipe.output.codes:
            members["codes.npy"] = encode_array(judged.codes)
        extent = shard.dad.add(key, members)
        row |= {"dad_offset": extent.offset, "dad_size": extent.size, "dad_crc32": extent.crc32}
    return row


def _soft_labels(logits: np.ndarray, sample: Prepared, recipe: Recipe) -> dict[str, bytes]:
    return soft_label_members(logits if sample.views is not None else logits[None], sample.views, recipe.views)


def _commit(shard: _Shard, out: RunDir, run: str) -> list[Row]:
    """Commit a shard and read it back. Raises the error that the shard failed with."""
    if shard.error is not None:
        raise shard.error
    tars = {stream: (tar.close(), tar.samples) for stream, tar in (("clean", shard.clean), ("dad", shard.dad))}
    out.commit(shard.number, shard.rows, tars, source=shard.piece.name, run=run)
    # a second worker on another kind of processor may have written different bytes to the same files
    if why := out.damage(shard.number, run):
        out.withdraw(shard.number)
        raise UserError(f"{why}; another worker wrote to it at the same time")
    return shard.rows


def _pool(stack: contextlib.ExitStack, threads: int, name: str) -> Executor:
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    stack.callback(pool.shutdown, wait=True, cancel_futures=True)
    return pool


def _plain(error: BaseException) -> Exception:
    if not isinstance(error, Exception):
        raise error
    return error
