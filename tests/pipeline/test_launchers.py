"""Many workers, on this machine and others, that die, leave and meet: one valid set, the same bytes as a single run's."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from manifests import RunDir, UserError
from manifests.claims import Claims, look, read_claim, read_failure, record_failure
from pipeline.generate import make_shards, prepare_job
from pipeline.job.worker import Work, _free_shards, _Pace, unfinished, work_through
from pipeline.launchers import local
from pipeline.launchers.local import devices
from pipeline.recipe import Recipe
from pipeline.status import Survey, status_lines
from pipeline.verify import problems, summary
from shards import ShardDataset
from shards.sources import find_source
from shards.sources.classes import load_classes

from ..patience import PATIENCE, wait_for

Digests = Callable[[Path], dict[str, str]]
Start = Callable[..., "subprocess.Popen[str]"]
SLOW = ("--set", "attack.steps=40")  # a second or two for each shard


@pytest.fixture(scope="module")
def slow_run(world, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """What a run with `SLOW` makes when nobody disturbs it."""
    out = tmp_path_factory.mktemp("slow") / "run"
    make_shards(world.load("attack.steps=40"), str(out))
    return out


def children(pid: int) -> list[int]:
    """Worker processes of a command, not counting multiprocessing's own resource tracker."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def gone(pids: list[int]) -> bool:
    """Ended: no process of that number, or one that only waits to be counted as dead."""
    states = [
        path.read_text().rpartition(")")[2].split()[0] for pid in pids if (path := Path(f"/proc/{pid}/stat")).exists()
    ]
    return set(states) <= {"Z"}


def claims_of(out: Path) -> Iterator[int]:
    """Process ids of the workers that hold a claim."""
    store = RunDir(out).store
    return (claim.pid for shard in look(store).running if (claim := read_claim(store, shard)))


@pytest.mark.slow
def test_a_worker_is_killed(world, slow_run: Path, run_digests: Digests, start: Start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Two workers, one killed with -9 while it makes a shard: status 0, the same bytes as one worker's, nothing left behind."""
    out = tmp_path / "run"
    process = start("generate", "--recipe", world.recipe, "--out", out, "--workers", "2", *SLOW)
    wait_for(lambda: list(claims_of(out)), process)
    victim = next(claims_of(out))
    assert victim in children(process.pid)
    os.kill(victim, signal.SIGKILL)
    told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, told
    assert run_digests(out) == run_digests(slow_run) and not (out / "work").exists()


@pytest.mark.slow
def test_the_parent_is_killed_and_two_go_on(
    world, slow_run: Path, run_digests: Digests, start: Start, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    """kill -9 of the command: its workers end too. Then two commands at once: both end well, one valid set, the same bytes."""
    out = tmp_path / "run"
    process = start("generate", "--recipe", world.recipe, "--out", out, "--workers", "2", *SLOW)
    wait_for(lambda: list(claims_of(out)), process)
    workers = children(process.pid)
    process.kill()
    wait_for(lambda: gone(workers))
    both = [start("generate", "--recipe", world.recipe, "--out", out, *SLOW) for _ in range(2)]
    for process in both:
        told = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, told
    assert run_digests(out) == run_digests(slow_run) and list(problems(str(out))) == []


@pytest.mark.slow
def test_ctrl_c(world, start: Start, cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Ctrl-C in a terminal reaches the command and its workers: all gone, one line, no claim left behind."""
    out = tmp_path / "run"
    process = start(
        "generate",
        "--recipe",
        world.recipe,
        "--out",
        out,
        "--workers",
        "2",
        "--set",
        "attack.steps=1000",
        start_new_session=True,
    )
    wait_for(lambda: list(claims_of(out)), process)
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert err.splitlines()[-1] == "interrupted; what was finished is kept, and the same command goes on from there"
    assert len(workers) == 2 and gone(workers) and not list(claims_of(out))
    assert "3 missing" in cli("status", out).out


@pytest.mark.slow
def test_ctrl_c_never_reaches_a_worker(world, start: Start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """From its first moment on, when an exception would come out of somebody's import: the parent says what to do."""
    process = start("generate", "--recipe", world.recipe, "--out", tmp_path / "run", "--workers", "2", *SLOW)
    wait_for(lambda: len(children(process.pid)) == 2, process)
    for child in children(process.pid):
        blocked = re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{child}/status").read_text())
        assert blocked is not None and int(blocked[1], 16) & 1 << (signal.SIGINT - 1)


def test_a_worker_s_complaint(world, cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """What a worker finds wrong with the recipe is the command's one line."""
    told = cli(
        "generate", "--recipe", world.recipe, "--out", tmp_path / "run", "--workers", "2", "--set", "device=cuda:7"
    )
    assert told.status == 2 and told.err.splitlines()[-1].startswith("error: device: 'cuda:7' is not usable here")


@pytest.mark.slow
def test_one_bad_device(  # type: ignore[no-untyped-def]
    world,
    finished_run: Path,
    run_digests: Digests,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The worker on it says why and leaves; the other makes all shards."""
    monkeypatch.setattr(local, "devices", lambda recipe: ["cuda:7", "cpu"])
    monkeypatch.setattr("pipeline.generate.devices", local.devices)
    make_shards(world.load(), str(tmp_path / "run"))
    assert run_digests(tmp_path / "run") == run_digests(finished_run)
    assert "a worker has left: device: 'cuda:7' is not usable here" in capsys.readouterr().err


@pytest.mark.slow
def test_a_disk_too_small_for_several_workers(world, cli, small_disk: Callable[[str], Path]) -> None:  # type: ignore[no-untyped-def]
    """No worker could go on: the first to find out ends the command."""
    told = cli("generate", "--recipe", world.recipe, "--out", small_disk("size=24k") / "run", "--workers", "2")
    assert told.status == 2 and "the disk is full" in told.err.splitlines()[-1] and "a worker has left" not in told.err


def begin(recipe: Recipe, out: Path, occupied: Iterable[int]) -> None:
    """A run of which nothing is made yet but run.json, and folders in place of the tars of some shards: no file can take these names."""
    job = prepare_job(recipe, str(out))
    job.out.begin(job.info)
    for shard in occupied:
        (out / "dad" / f"dad-{shard:06d}.tar").mkdir(parents=True)


def test_a_shard_that_cannot_be_made(world, cli, finished_run: Path, run_digests: Digests, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Tried three times, then named with its reason, status 2, not sealed; the others are done. --allow-missing seals without it and
    records why; when the reason is gone the same command completes the set."""
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
    """Shard after shard fails for no reason of the source: the worker ends and says why, before every shard is given up."""
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
    """A file of a folder becomes a row with status error, a tar a shard that failed; the rest is made. Only OUT ends a worker."""
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
    line = r"batch: 5 images do not fit into memory; lower batch \(which makes another run: choose another OUT\) \(.*can't allocate memory"
    with pytest.raises(UserError, match=f"2 shards in a row failed, the last with {line}") as caught:
        work_through(work, models=replace(models, teacher_model=Greedy()))
    failure = read_failure(job.out.store, 0)
    assert failure is not None and re.match(line, failure.reason) and "\n" not in str(caught.value)


def test_another_writer_comes_late(world, finished_run: Path, run_digests: Digests, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """After shard 1 was committed, a worker of another kind of machine puts its own tar in place: noticed before sealing, made anew."""
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


def test_devices(world) -> None:  # type: ignore[no-untyped-def]
    """One worker on the CPU unless more are asked for; devices are dealt in turn."""
    assert devices(world.load()) == ["cpu"] and devices(world.load("launch.workers=3")) == ["cpu"] * 3


BUSY = {"503": 0.05, "cut answer": 0.02, "cut request": 0.02}


@pytest.mark.slow
def test_an_object_store_under_fire(
    world, finished_run: Path, run_digests: Digests, faults: dict[str, float], cli
) -> None:  # type: ignore[no-untyped-def]
    """OUT=s3://…, while the store answers 503 and cuts connections: the same bytes; status, verify and the reader work on the URL."""
    url = "s3://bucket/under-fire"
    faults |= BUSY
    assert cli("generate", "--recipe", world.recipe, "--out", url).status == 0
    run = RunDir(url)
    assert {name: run.store.sha256(name) for name in run_digests(finished_run)} == run_digests(finished_run)
    assert list(problems(url)) == [] and "3 of 3 shards done, 0 missing, 0 damaged" in cli("status", url).out
    theirs, ours = ShardDataset(url, "dad"), ShardDataset(str(finished_run), "dad")
    assert len(theirs) == len(ours) and (theirs[7].image == ours[7].image).all()  # type: ignore[union-attr]


@pytest.mark.slow
def test_killed_while_writing_to_an_object_store(
    world, finished_run: Path, run_digests: Digests, object_store: object, start: Start
) -> None:  # type: ignore[no-untyped-def]
    """kill -9 after the first shard, two workers go on: no claim counts as done, the same bytes."""
    url = "s3://bucket/killed"
    run = RunDir(url)
    process = start("generate", "--recipe", world.recipe, "--out", url)
    wait_for(lambda: run.store.names("clean"), process)
    process.kill()
    assert not run.store.exists("manifest.parquet")
    again = start("generate", "--recipe", world.recipe, "--out", url, "--workers", "2")
    told = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, told
    assert {name: run.store.sha256(name) for name in run_digests(finished_run)} == run_digests(finished_run)
