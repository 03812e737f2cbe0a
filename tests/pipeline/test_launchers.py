"""Many workers die, leave and meet, here and elsewhere: one valid set, with the bytes of a single run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from manifests import RunDir
from manifests.claims import look, read_claim
from pipeline.generate import make_shards
from pipeline.launchers import local
from pipeline.launchers.local import devices
from pipeline.verify import problems
from shards import ShardDataset

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
    """One of two workers is killed with -9 in a shard: status 0, the bytes of one worker, nothing left behind."""
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
    """kill -9 of the command ends its workers too. Two commands at once then make one valid set, the same bytes."""
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


def test_devices(world) -> None:  # type: ignore[no-untyped-def]
    """One worker on the CPU unless more are asked for; devices are dealt in turn."""
    assert devices(world.load()) == ["cpu"] and devices(world.load("launch.workers=3")) == ["cpu"] * 3


BUSY = {"503": 0.05, "cut answer": 0.02, "cut request": 0.02}


@pytest.mark.slow
def test_an_object_store_under_fire(
    world, finished_run: Path, run_digests: Digests, faults: dict[str, float], cli
) -> None:  # type: ignore[no-untyped-def]
    """A store that answers 503 and cuts connections gets the same bytes; status, verify and reader take the URL."""
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
