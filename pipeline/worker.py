"""What every launcher runs, as often as there are devices: load the models once, make shards until none is left.

Workers share the shards of a run through the claims in its directory (`manifests.claims`) and through nothing else. So a worker may
die, come back or join late, on any machine and under any engine, and two commands at once help each other.
"""

from __future__ import annotations

import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from manifests import RunDir, Unwritable, UserError
from manifests.claims import Claims, Failure, forget, look, read_failure, record_failure
from manifests.weights import find_file

from .classes import ClassList, load_classes
from .gallery import GALLERY, make_gallery
from .models import Models, load_models
from .recipe import Recipe
from .shard_job import Row, run_shard
from .sources import Piece

SHOWN = 0  # the gallery shows this shard; whoever makes it has the models at hand and draws it
Report = Callable[[list[Row]], None]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a worker is told: picklable, and the same for every worker of a launch."""

    recipe: Recipe
    out: str
    run: str  # fingerprint of the run
    todo: tuple[int, ...]  # numbers of the shards to make
    pieces: Sequence[Piece]  # of all shards


def finished(out: RunDir) -> set[int]:
    """Shards that need no work: their part file is there, and for the one that the gallery shows, the gallery too."""
    done = out.shards_with_parts()
    return done if SHOWN not in done or out.store.exists(GALLERY) else done - {SHOWN}


def unfinished(work: Work, out: RunDir) -> tuple[list[int], dict[int, Failure]]:
    """The shards of a launch that are still to be made, those that failed least often first; and those that are given up."""
    done, board = finished(out), look(out.store)
    failures = {shard: failure for shard in board.failed if (failure := read_failure(out.store, shard))}
    given_up = {s: f for s, f in failures.items() if f.tries > work.recipe.launch.retries and s not in done and s in work.todo}
    left = [shard for shard in work.todo if shard not in done and shard not in given_up]
    return sorted(left, key=lambda shard: failures[shard].tries if shard in failures else 0), given_up


def work_through(work: Work, index: int = 0, count: int = 1, models: Models | None = None, report: Report = lambda rows: None) -> None:
    """Make shards of ``work`` until each is done or given up, by this worker or another; number ``index`` of ``count`` workers.

    A shard that fails is recorded with its reason and tried again, here or elsewhere. Raises UserError when going on is useless: a
    recipe that does not fit, a full disk, or more than ``retries`` shards that failed one after the other for no fault of the source.
    """
    out = RunDir(work.out)
    classes = load_classes(find_file(work.recipe.source.classes, "source.classes"))
    models = models or load_models(work.recipe, classes)
    pace = _Pace()
    broken: set[int] = set()
    with Claims(out.store) as claims:
        for shard in _available(work, out, claims, index, count):

            def tell(rows: list[Row], shard: int = shard) -> None:
                report(rows)
                counts = pace.add(rows)
                claims.tell(
                    shard, samples=counts.total(), verified=counts["verified"], rejected=counts["rejected"], rate=pace.samples_per_second
                )

            try:
                pace.start()
                _make(shard, work, classes, models, out, tell)
                forget(out.store, shard)
                broken.clear()
            except Unwritable:
                raise
            except UserError as error:  # of the source, for example
                record_failure(out.store, shard, str(error))
            except Exception as error:  # a GPU may be out of memory once; a worker that fails again and again must not eat every shard
                record_failure(out.store, shard, _one_line(error))
                broken.add(shard)
                if len(broken) > work.recipe.launch.retries:
                    raise UserError(f"{out}: {len(broken)} shards in a row failed, the last with {_one_line(error)}") from error
            finally:
                claims.release(shard)


def _available(work: Work, out: RunDir, claims: Claims, index: int, count: int) -> Iterator[int]:
    """Claimed shards, one at a time. Workers begin at different places, and wait for what others make in case they die."""
    start = len(work.todo) * index // count
    rank = {shard: n for n, shard in enumerate(work.todo[start:] + work.todo[:start])}
    while True:
        left, _ = unfinished(work, out)
        if not left:
            return
        running = look(out.store).running
        free = (shard for shard in sorted(left, key=rank.__getitem__) if shard not in running and claims.take(shard))
        claimed = [shard for shard in left if shard in running]
        taken = next(free, None)
        if taken is None:  # a few at random: many workers wait at the end, and each look is a request
            taken = next((shard for shard in random.sample(claimed, min(len(claimed), 8)) if claims.take_over(shard)), None)
        if taken is None:
            time.sleep(1 if out.store.is_local else 5)
        else:
            yield taken


def _make(shard: int, work: Work, classes: ClassList, models: Models, out: RunDir, report: Report) -> None:
    piece = work.pieces[shard]
    if out.damage(shard, work.run) is not None:
        run_shard(shard, piece, work.recipe, classes, models, out, work.run, report)
        # On another kind of processor a second worker at the same shard may have put its own bytes in place of these
        if why := out.damage(shard, work.run):
            out.withdraw(shard)
            raise UserError(f"{why}; somebody else wrote to it at the same time")
    if shard == SHOWN:
        rows, _ = out.part(shard)
        out.store.write(GALLERY, make_gallery(rows, piece, work.recipe, classes, models))


class _Pace:
    """Samples of the present shard by status, and the worker's speed over the time that it was making shards."""

    def __init__(self) -> None:
        self._samples, self._seconds = 0, 0.0
        self.start()

    def start(self) -> None:
        self._counts: Counter[str] = Counter()
        self._since = time.monotonic()

    def add(self, rows: list[Row]) -> Counter[str]:
        now = time.monotonic()
        self._counts.update(str(row["status"]) for row in rows)
        self._samples, self._seconds, self._since = self._samples + len(rows), self._seconds + now - self._since, now
        return self._counts

    @property
    def samples_per_second(self) -> float:
        return self._samples / self._seconds if self._seconds else 0.0


def _one_line(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({Path(place.filename).name}:{place.lineno})"
