"""The worker that every launcher runs, one per device: it loads the models once and makes shards until none is left.

Workers share the shards of a run only through the claims in its directory (`manifests.claims`). So a worker may die,
come back or start late, on any machine and under any engine, and two commands at once help each other.
"""

from __future__ import annotations

import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from manifests import RunDir, Unwritable, UserError, one_line
from manifests.claims import Claims, Failure, forget, look, read_failure, record_failure
from manifests.devices import out_of_memory
from manifests.notes import note
from manifests.rundir import GALLERY
from shards.sources import Piece
from shards.sources.classes import ClassList, find_classes

from ..recipe import Recipe
from .batch import Row
from .gallery import make_gallery
from .models import Models, load_models
from .shard import run_shards

SHOWN = 0  # the gallery shows samples of this shard; a worker draws it, because workers have the models
Report = Callable[[list[Row]], None]


@dataclass(frozen=True, kw_only=True)
class Work:
    """The task of a launch, the same for each of its workers. Can be pickled."""

    recipe: Recipe
    out: str
    run: str  # fingerprint of the run
    todo: tuple[int, ...]  # numbers of the shards to make
    pieces: Sequence[Piece]  # of all shards


def unfinished(work: Work, out: RunDir) -> tuple[list[int], dict[int, Failure]]:
    """(shards still to make, fewest failures first; shards given up, with their last failure)"""
    done, failed = out.shards_with_parts(), look(out.store).failed.intersection(work.todo)
    failures = {shard: failure for shard in failed - done if (failure := read_failure(out.store, shard))}
    given_up = {shard: failure for shard, failure in failures.items() if failure.tries > work.recipe.launch.retries}
    left = [shard for shard in work.todo if shard not in done and shard not in given_up]
    return sorted(left, key=lambda shard: failures[shard].tries if shard in failures else 0), given_up


def work_through(
    work: Work, index: int = 0, count: int = 1, models: Models | None = None, report: Report = lambda rows: None
) -> None:
    """Make shards of ``work``, as worker ``index`` of ``count``, until each is done or given up by some worker.

    A shard that fails is recorded with its reason and tried again, here or elsewhere. Raises Unwritable when OUT cannot
    be written, so that no worker can go on. Raises UserError when this worker cannot: the models do not fit its device,
    or more than ``retries`` shards in a row failed for no fault of the source.
    """
    out = RunDir(work.out)
    classes, _ = find_classes(work.recipe.source.classes)
    models = models or load_models(work.recipe, classes)
    pace, broken = _Pace(), set[int]()
    with Claims(out.store) as claims:

        def record(shard: int, rows: list[Row]) -> None:
            report(rows)
            counts = pace.add(shard, rows)
            claims.update(
                shard, samples=counts.total(), verified=counts["verified"], rejected=counts["rejected"], rate=pace.rate
            )

        free = _free_shards(work, out, claims, pace, index, count)
        for shard, outcome in run_shards(free, work.recipe, classes, models, out, work.run, record):
            problem = outcome if isinstance(outcome, Exception) else None
            pace.forget(shard)
            try:
                if problem is None:
                    forget(out.store, shard)
                    broken.clear()
                elif isinstance(problem, Unwritable):
                    raise problem
                elif isinstance(problem, UserError):  # a damaged source, for example
                    record_failure(out.store, shard, str(problem))
                else:  # a GPU may run out of memory once, but a broken worker must not use up every shard's retries
                    reason = _reason(problem, work.recipe.batch)
                    record_failure(out.store, shard, reason)
                    broken.add(shard)
                    if len(broken) > work.recipe.launch.retries:
                        raise UserError(
                            f"{out}: {len(broken)} shards in a row failed, the last with {reason}"
                        ) from problem
            finally:
                claims.release(shard)
        _draw_gallery(work, out, claims, classes, models)


def _free_shards(
    work: Work, out: RunDir, claims: Claims, pace: _Pace, index: int, count: int
) -> Iterator[tuple[int, Piece] | None]:
    """Claim shards and yield them with their pieces; None when none is free while this worker has some in flight.

    Workers begin at different places in the list. At its end they wait for shards of others, whose workers may die.
    """
    start = len(work.todo) * index // count
    work = replace(work, todo=work.todo[start:] + work.todo[:start])
    while True:
        left, _ = unfinished(work, out)
        running = look(out.store).running
        shard = next((shard for shard in left if shard not in running and claims.take(shard)), None)
        if shard is None:  # look at a few claims at random: many workers wait at the end, and each look is a request
            claimed = [shard for shard in left if shard in running and shard not in claims.mine]
            shard = next(
                (shard for shard in random.sample(claimed, min(len(claimed), 8)) if claims.take_over(shard)), None
            )
        if shard is not None and out.damage(shard, work.run) is None:  # another worker has just finished it
            claims.release(shard)
        elif shard is not None:
            yield shard, work.pieces[shard]
        elif claims.mine:
            yield None
        elif left:
            time.sleep(1 if out.store.is_local else 5)
            pace.skip()
        else:
            return


def _draw_gallery(work: Work, out: RunDir, claims: Claims, classes: ClassList, models: Models) -> None:
    """Draw the gallery, in one of the workers. Its failure is a note only: the shards do not need it."""
    if SHOWN in out.shards_with_parts() and not out.store.exists(GALLERY) and claims.take(SHOWN):
        try:
            rows, _ = out.part(SHOWN)
            out.store.write(GALLERY, make_gallery(rows, work.pieces[SHOWN], work.recipe, classes, models))
        except Exception as error:
            note(f"{out.store.where(GALLERY)} could not be drawn: {_message(error)}")
        finally:
            claims.release(SHOWN)


class _Pace:
    """Samples of each shard by status, and the worker's speed while it was making shards."""

    def __init__(self) -> None:
        self._counts: dict[int, Counter[str]] = {}
        self._samples, self._seconds, self._since = 0, 0.0, time.monotonic()

    def add(self, shard: int, rows: list[Row]) -> Counter[str]:
        """Count rows of a shard; returns its samples so far, by status."""
        counts = self._counts.setdefault(shard, Counter())
        counts.update(str(row["status"]) for row in rows)
        now = time.monotonic()
        self._samples, self._seconds, self._since = self._samples + len(rows), self._seconds + now - self._since, now
        return counts

    def forget(self, shard: int) -> None:
        """Drop a finished or failed shard: if it is tried again, its samples are counted anew."""
        self._counts.pop(shard, None)

    def skip(self) -> None:
        """Leave out the time since the last call, which was spent waiting for other workers."""
        self._since = time.monotonic()

    @property
    def rate(self) -> float:
        """Samples per second, waiting excluded."""
        return self._samples / self._seconds if self._seconds else 0.0


def _reason(error: Exception, batch: int) -> str:
    """An error in one line; if memory has run out, with what to change."""
    if what := out_of_memory(error):
        fix = "lower batch (which makes another run: choose another OUT)"
        return f"batch: {batch} images do not fit into memory; {fix} ({what})"
    return _message(error)


def _message(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {one_line(error)} ({Path(place.filename).name}:{place.lineno})"
