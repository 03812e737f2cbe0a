"""Shards that cannot be made: the others are, and the failed ones are named with their reasons."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from manifests import RunDir, UserError
from manifests.claims import Claims, look, read_failure, record_failure
from pipeline.generate import make_shards, prepare_job
from pipeline.job.worker import Work, _free_shards, _Pace, unfinished, work_through
from pipeline.recipe import Recipe
from pipeline.status import Survey, status_lines
from pipeline.verify import problems, summary
from shards import ShardDataset
from shards.sources import find_source
from shards.sources.classes import load_classes

from ..patience import wait_for
from .test_launchers import claims_of

Digests = Callable[[Path], dict[str, str]]


def begin(recipe: Recipe, out: Path, occupied: Iterable[int]) -> None:
    """A run holds nothing but run.json, and folders in place of some tars, so that no file can take these names."""
    job = prepare_job(recipe, str(out))
    job.out.begin(job.info)
    for shard in occupied:
        (out / "dad" / f"dad-{shard:06d}.tar").mkdir(parents=True)


def test_a_shard_that_cannot_be_made(world, cli, finished_run: Path, run_digests: Digests, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """It is tried three times, then named with its reason: status 2, not sealed, the others are done.

    --allow-missing seals without it and records why; once the reason is gone, the same command completes the set.
    """
    out = tmp_path / "run"
    begin(world.load(), out, [1])
    command = ("generate", "--recipe", world.recipe, "--out", out)
    told = cli(*command)
    line = told.err.splitlines()[-1]
    assert (
        told.status == 2 and "1 of 3 shards could not be made, the first 1: failed 3 times: IsADirectoryError" in line
    )
    assert not (out / "manifest.parquet").exists() and RunDir(out).shards_with_parts() == {0, 2}
    lines = status_lines(str(out), Survey(RunDir(out)).look(tars=True))
    assert "2 of 3 shards done, 1 missing, 0 damaged, 1 failed" in lines[0] and "failed: shard 1, 3 times" in lines[1]

    told = cli(*command, "--allow-missing")
    assert told.status == 0 and "sealed without them, as run.json records" in told.err
    assert (
        list(RunDir(out).info().missing or {}) == ["1"]
        and "IsADirectoryError" in json.loads((out / "run.json").read_text())["missing"]["1"]
    )
    assert list(problems(str(out))) == [] and "1 of 3 shards are missing with leave" in summary(str(out))
    assert len(ShardDataset(str(out), "clean")) == 24 and "sealed without 1 shards" in cli("status", out).out

    (out / "dad" / "dad-000001.tar").rmdir()
    assert cli(*command).status == 0
    assert (
        run_digests(out) == run_digests(finished_run)
        and RunDir(out).info().missing is None
        and not (out / "work").exists()
    )


def test_a_broken_worker_does_not_eat_every_shard(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Shard after shard fails, and not for its source: the worker says why and ends, before all are given up."""
    out = tmp_path / "run"
    begin(world.load(), out, range(3))
    with pytest.raises(UserError, match=r"2 shards in a row failed, the last with IsADirectoryError"):
        make_shards(world.load("launch.retries=1"), str(out))
    assert not list(claims_of(out))


class Guarded(MemoryFileSystem):  # type: ignore[misc]
    """A store that refuses to give some of its objects."""

    protocol = "guarded"
    refused = ""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.removeprefix("guarded://")))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: object) -> bytes:
        if self.refused and self.refused in path:
            raise PermissionError("Forbidden")
        return bytes(super().cat_file(path, start=start, end=end, **options))


@pytest.mark.parametrize("kind", ["images", "tars"])
def test_a_source_object_out_of_reach(world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:  # type: ignore[no-untyped-def]
    """An unreadable file becomes a row with status error, an unreadable tar a failed shard. Only OUT ends a worker."""
    monkeypatch.setenv("DAD_PROTOCOLS", "guarded")
    fsspec.register_implementation("guarded", Guarded, clobber=True)
    folder, url, out = getattr(world, kind), f"guarded://{tmp_path}", tmp_path / "run"
    for path in (path for path in folder.rglob("*") if path.is_file()):
        Guarded().pipe_file(f"{tmp_path}/{path.relative_to(folder)}", path.read_bytes())
    job = prepare_job(world.load(f"source.data={url}"), str(out))
    job.out.begin(job.info)
    monkeypatch.setattr(Guarded, "refused", {"images": "img_020", "tars": "source-1.tar"}[kind])
    work = Work(recipe=job.recipe, out=str(out), run=job.info.fingerprint, todo=(0, 1, 2), pieces=job.source.pieces)
    work_through(work, models=job.models)
    reason = "the store refuses or cannot be reached (Forbidden)"
    if kind == "tars":
        failure = read_failure(job.out.store, 1)
        assert (
            job.out.shards_with_parts() == {0, 2}
            and failure is not None
            and failure.tries == 3
            and reason in failure.reason
        )
    else:
        rows = {row["key"]: row for row in job.out.read_parts(range(3))[0].to_pylist()}
        (key,) = (key for key in rows if key.endswith("img_020"))
        assert (
            len(rows) == 36
            and rows[key]["status"] == "error"
            and rows[key]["reason"].startswith("cannot read the file: guarded:/")
        )
        assert sum(row["status"] == "error" for row in rows.values()) == 2


class Greedy(torch.nn.Module):
    """A teacher that wants more memory than there is."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.empty(1 << 58).expand(len(images), -1)


def test_a_batch_that_does_not_fit(world, models, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """One line that names the field to lower, in the record of the shard and as the last word of the worker."""
    job = prepare_job(world.load("launch.retries=1"), str(tmp_path / "run"))
    job.out.begin(job.info)
    work = Work(recipe=job.recipe, out=str(job.out), run=job.info.fingerprint, todo=(0, 1, 2), pieces=job.source.pieces)
    line = (
        r"batch: 5 images do not fit into memory; lower batch \(which makes another run: choose another OUT\) "
        r"\(.*can't allocate memory"
    )
    with pytest.raises(UserError, match=f"2 shards in a row failed, the last with {line}") as caught:
        work_through(work, models=replace(models, teacher_model=Greedy()))
    failure = read_failure(job.out.store, 0)
    assert failure is not None and re.match(line, failure.reason) and "\n" not in str(caught.value)


def test_another_writer_comes_late(world, finished_run: Path, run_digests: Digests, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Another kind of machine replaces a tar of shard 1 after its commit: sealing notices it and makes it anew."""
    out, other = tmp_path / "run", tmp_path / "other.tar"
    other.write_bytes((finished_run / "dad" / "dad-000002.tar").read_bytes())

    def interfere() -> None:
        wait_for((out / "manifest" / "part-000001.parquet").exists)
        other.rename(out / "dad" / "dad-000001.tar")

    thread = threading.Thread(target=interfere)
    thread.start()
    make_shards(world.load(), str(out))
    thread.join()
    assert not other.exists() and run_digests(out) == run_digests(finished_run) and list(problems(str(out))) == []


def test_a_shard_that_kills_its_workers(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Claims of dead workers count as failed tries: such a shard is given up in the end, with that reason."""
    out = tmp_path / "run"
    store = RunDir(out).store
    claims = Claims(store)
    for _ in range(3):  # a worker that claims shard 1 and dies, three times
        child = os.fork()
        if not child:
            os._exit(not (claims.take(1) if not look(store).running else claims.take_over(1)))
        assert os.waitpid(child, 0)[1] == 0
    assert claims.take_over(1)
    failure = read_failure(store, 1)
    assert failure is not None and failure.tries == 3 and "died or fell silent" in failure.reason
    work = Work(recipe=world.load(), out=str(out), run="", todo=(0, 1, 2), pieces=())
    left, given_up = unfinished(work, RunDir(out))
    assert left == [0, 2] and list(given_up) == [1]


def test_what_failed_comes_last(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Workers begin at different places, each with the shards that failed least often."""
    pieces = find_source(str(world.tars), load_classes(world.clip / "prompts.yaml"), 12).pieces
    work, out = Work(recipe=world.load(), out=str(tmp_path), run="", todo=(0, 1, 2), pieces=pieces), RunDir(tmp_path)
    record_failure(out.store, 1, "once")
    for index, order in enumerate(([0, 2, 1], [2, 0, 1], [2, 0, 1])):
        with Claims(out.store) as claims:
            free = _free_shards(work, out, claims, _Pace(), index, 3)
            assert [entry and entry[0] for entry in islice(free, 4)] == [*order, None]
