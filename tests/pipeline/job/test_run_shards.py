"""Many shards in flight at once: the bytes of one at a time, whatever fails, stops or runs beside."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from manifests import RunDir, UserError
from pipeline.job import batch
from pipeline.job.models import Models, load_models
from pipeline.job.shard import run_shard, run_shards
from shards.sources import Piece, SourceSample, find_source
from shards.sources.classes import ClassList, load_classes

Digests = Callable[[Path], dict[str, str]]
Work = list[tuple[int, Piece] | None]


@pytest.fixture(scope="module")
def classes(world) -> ClassList:  # type: ignore[no-untyped-def]
    return load_classes(world.clip / "prompts.yaml")


@pytest.fixture(scope="module")
def pieces(world, classes: ClassList) -> list[Piece]:  # type: ignore[no-untyped-def]
    """Eight shards of five samples or fewer, of the world's tars."""
    return list(find_source(str(world.tars), classes, 5).pieces)


@pytest.fixture(scope="module")
def one_by_one(
    world, classes: ClassList, models: Models, pieces: list[Piece], tmp_path_factory: pytest.TempPathFactory
) -> Path:  # type: ignore[no-untyped-def]
    """Every shard made alone."""
    out = tmp_path_factory.mktemp("alone")
    for shard, piece in enumerate(pieces):
        run_shard(shard, piece, world.load("batch=2"), classes, models, RunDir(out), "run", lambda rows: None)
    return out


@dataclasses.dataclass(frozen=True)
class Failing:
    """A piece whose source breaks after some samples."""

    piece: Piece
    after: int

    @property
    def name(self) -> str:
        return self.piece.name

    @property
    def count(self) -> int:
        return self.piece.count

    def samples(self, classes: ClassList) -> Iterator[SourceSample]:
        for number, sample in enumerate(self.piece.samples(classes)):
            if number == self.after:
                raise UserError(f"{self.name}: damaged here")
            yield sample


def until_threads_end(before: int) -> None:
    """Fails when more than ``before`` threads are left after some seconds."""
    for _ in range(100):
        if threading.active_count() <= before:
            return
        time.sleep(0.05)
    raise AssertionError(f"left: {[thread.name for thread in threading.enumerate()]}")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_bytes_as_one_at_a_time(  # type: ignore[no-untyped-def]
    world,
    classes: ClassList,
    models: Models,
    pieces: list[Piece],
    one_by_one: Path,
    run_digests: Digests,
    tmp_path: Path,
    threads: int,
) -> None:
    """Any order of work, any number of codec threads, pauses in the work: every shard has the same files."""
    work: Work = [(shard, pieces[shard]) for shard in reversed(range(len(pieces)))]
    work[3:3] = [None]
    seen: list[tuple[int, int]] = []
    report = lambda shard, rows: seen.append((shard, len(rows)))  # noqa: E731
    recipe = world.load("batch=2", f"codec_threads={threads}")
    outcomes = list(run_shards([*work, None], recipe, classes, models, RunDir(tmp_path), "run", report))
    assert [shard for shard, _ in outcomes] == [entry[0] for entry in work if entry]
    assert run_digests(tmp_path) == run_digests(one_by_one) and len(run_digests(tmp_path)) == 3 * len(pieces)
    assert sum(count for _, count in seen) == 36
    for shard, rows in outcomes:
        assert (
            isinstance(rows, list)
            and sum(count for number, count in seen if number == shard) == len(rows) == pieces[shard].count
        )


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_shard_that_fails_leaves_the_others_alone(  # type: ignore[no-untyped-def]
    world,
    classes: ClassList,
    models: Models,
    pieces: list[Piece],
    one_by_one: Path,
    run_digests: Digests,
    tmp_path: Path,
    after: int,
) -> None:
    """A source that breaks at its start, middle or end: its shard says why and writes nothing; all others are made."""
    bad = {1, 2, len(pieces) - 1}
    counts = [piece.count for piece in pieces]
    work = [(n, Failing(piece, min(after, counts[n] - 1)) if n in bad else piece) for n, piece in enumerate(pieces)]
    recipe = world.load("batch=2")
    outcomes = dict(run_shards(work, recipe, classes, models, RunDir(tmp_path), "run", lambda shard, rows: None))
    assert {shard for shard, rows in outcomes.items() if isinstance(rows, Exception)} == bad
    assert all(isinstance(outcomes[shard], UserError) and "damaged here" in str(outcomes[shard]) for shard in bad)
    expected = {
        name: digest for name, digest in run_digests(one_by_one).items() if int(name.rsplit(".")[0][-6:]) not in bad
    }
    assert run_digests(tmp_path) == expected and files(tmp_path) == set(expected)


def test_a_damaged_tar_between_good_ones(world, classes: ClassList, models: Models, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A tar that is overwritten after it was indexed fails its shard by name; once mended, it gets its old bytes."""
    tars = Path(shutil.copytree(world.tars, tmp_path / "tars"))
    work = list(enumerate(find_source(str(tars), classes, 12).pieces))
    whole = (tars / "source-1.tar").read_bytes()
    (tars / "source-1.tar").write_bytes(whole[: len(whole) // 2])
    outcomes = dict(
        run_shards(work, world.load(), classes, models, RunDir(tmp_path / "run"), "run", lambda shard, rows: None)
    )
    assert isinstance(outcomes[1], UserError) and "source-1.tar" in str(outcomes[1])
    assert [len(outcomes[n]) for n in (0, 2)] == [12, 12]  # type: ignore[arg-type]
    (tars / "source-1.tar").write_bytes(whole)
    assert (
        len(run_shard(*work[1], world.load(), classes, models, RunDir(tmp_path / "run"), "run", lambda rows: None))
        == 12
    )


def test_a_model_that_fails(  # type: ignore[no-untyped-def]
    world, classes: ClassList, models: Models, pieces: list[Piece], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the second shard's model calls is that shard's outcome, and no other's."""
    attack, calls = batch.attack, []

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("device lost")
        return attack(*arguments)

    monkeypatch.setattr(batch, "attack", failing)
    work = list(enumerate(pieces[:4]))
    outcomes = dict(
        run_shards(work, world.load("batch=2"), classes, models, RunDir(tmp_path), "run", lambda shard, rows: None)
    )
    failed = {shard: str(rows) for shard, rows in outcomes.items() if isinstance(rows, Exception)}
    assert failed == {1: "device lost"}


def test_nothing_is_drawn_long_before_it_is_needed(  # type: ignore[no-untyped-def]
    world, classes: ClassList, models: Models, pieces: list[Piece], tmp_path: Path
) -> None:
    """Work is drawn at most one shard ahead, so that others find the rest; after None the drawn shards are finished."""
    drawn: list[int] = []
    finished: list[int] = []

    def work() -> Iterator[tuple[int, Piece] | None]:
        for shard, piece in enumerate(pieces):
            drawn.append(shard)
            assert len(drawn) - len(finished) <= 4, "more than what is read, attacked, judged and written"
            yield shard, piece
            asked = 0
            while shard == 3 and finished != [0, 1, 2, 3]:
                yield None
                asked += 1
                assert asked < 50, "None never brings what is in flight to its end"

    for shard, _ in run_shards(
        work(), world.load("batch=2"), classes, models, RunDir(tmp_path), "run", lambda shard, rows: None
    ):
        finished.append(shard)
    assert finished == list(range(len(pieces)))


def test_no_work(world, classes: ClassList, models: Models, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for work in ([], [None], [None, None]):
        assert (
            list(run_shards(work, world.load(), classes, models, RunDir(tmp_path), "run", lambda shard, rows: None))
            == []
        )
    assert files(tmp_path) == set()


class Stop(BaseException):
    """An exception like KeyboardInterrupt, which no code may take for a shard's failure."""


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_interrupted_in_a_report(  # type: ignore[no-untyped-def]
    world,
    classes: ClassList,
    models: Models,
    pieces: list[Piece],
    one_by_one: Path,
    run_digests: Digests,
    tmp_path: Path,
    batches: int,
) -> None:
    """An interruption is raised at once and leaves no thread and no half file; later work completes the run."""
    before = threading.active_count()
    calls: list[int] = []

    def report(shard: int, rows: Any) -> None:
        calls.append(shard)
        if len(calls) == batches:
            raise Stop

    recipe = world.load("batch=2")
    with pytest.raises(Stop):
        list(run_shards(enumerate(pieces), recipe, classes, models, RunDir(tmp_path), "run", report))
    until_threads_end(before)
    made = run_digests(tmp_path)
    assert made.items() <= run_digests(one_by_one).items() and files(tmp_path) == set(made)
    missing = [(shard, piece) for shard, piece in enumerate(pieces) if f"manifest/part-{shard:06d}.parquet" not in made]
    list(run_shards(missing, recipe, classes, models, RunDir(tmp_path), "run", lambda shard, rows: None))
    assert run_digests(tmp_path) == run_digests(one_by_one)


def test_left_in_the_middle(  # type: ignore[no-untyped-def]
    world,
    classes: ClassList,
    models: Models,
    pieces: list[Piece],
    one_by_one: Path,
    run_digests: Digests,
    tmp_path: Path,
) -> None:
    """A caller that stops listening: the generator closes, threads end, files are whole."""
    before = threading.active_count()
    shards = run_shards(
        enumerate(pieces), world.load("batch=2"), classes, models, RunDir(tmp_path), "run", lambda shard, rows: None
    )
    assert next(shards)[0] == 0
    shards.close()  # type: ignore[attr-defined]
    until_threads_end(before)
    made = run_digests(tmp_path)
    assert made and made.items() <= run_digests(one_by_one).items() and files(tmp_path) == set(made)


def test_a_disk_that_fails_is_the_shard_s_outcome(  # type: ignore[no-untyped-def]
    world, classes: ClassList, models: Models, pieces: list[Piece], small_disk, tmp_path: Path
) -> None:
    """Writing goes on beside the models: its errors still arrive, as that shard's outcome."""
    out = small_disk("size=16k")
    outcomes = dict(
        run_shards(enumerate(pieces[:3]), world.load(), classes, models, RunDir(out), "run", lambda shard, rows: None)
    )
    assert (
        any(isinstance(rows, UserError) and "disk is full" in str(rows) for rows in outcomes.values())
        and len(outcomes) == 3
    )


COMPILER = pytest.mark.skipif(
    "TEST_INDUCTOR" not in os.environ, reason="a minute of a C++ compiler; TEST_INDUCTOR=1 runs it"
)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=COMPILER)])
def test_compiled_models_give_the_same_verdicts(  # type: ignore[no-untyped-def]
    world, classes: ClassList, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """compile=true, forward and backward, may change last bits, no verdict. One batch, as each size compiles anew."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    recipe = world.load("compile=true", "batch=12")
    compiled = load_models(recipe, classes)
    assert compiled.compiled is not None
    piece = find_source(str(world.tars), classes, 12).pieces[0]
    rows = run_shard(0, piece, recipe, classes, compiled, RunDir(tmp_path), "run", lambda new: None)
    expected = {row["key"]: row for row in RunDir(finished_run).manifest()[0].to_pylist()}
    assert [row["status"] for row in rows] == [expected[row["key"]]["status"] for row in rows] and len(rows) == 12
    for row in rows:
        assert row["loss_clean"] == pytest.approx(expected[row["key"]]["loss_clean"], abs=2e-3)
