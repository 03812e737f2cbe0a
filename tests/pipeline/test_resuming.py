"""Stage 1 resumes: after damage, kills and full disks it makes exactly what is missing, with the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from manifests import RunDir
from pipeline.generate import make_shards
from pipeline.verify import problems

from ..patience import PATIENCE

Digests = Callable[[Path], dict[str, str]]


def leftovers(out: Path) -> list[Path]:
    """Temporary files below a folder."""
    return [path for path in out.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".")]


def times(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_a_finished_run_is_left_alone(world, run_copy: Path) -> None:  # type: ignore[no-untyped-def]
    """Running it again writes no file."""
    before = times(run_copy)
    make_shards(world.load(), str(run_copy))
    assert times(run_copy) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: (run / "dad" / "dad-000001.tar").unlink(),
        lambda run: (run / "clean" / "clean-000001.tar").write_bytes(
            (run / "clean" / "clean-000001.tar").read_bytes()[:-512]
        ),
        lambda run: (run / "manifest" / "part-000001.parquet").unlink(),
        lambda run: (run / "manifest" / "part-000001.parquet").write_bytes(b"PAR1 no more"),
        lambda run: shutil.copy(run / "manifest" / "part-000000.parquet", run / "manifest" / "part-000001.parquet"),
    ],
)
def test_only_what_is_damaged_is_made_anew(
    world,
    run_copy: Path,
    finished_run: Path,
    run_digests: Digests,
    damage: Callable[[Path], object],
    capsys: pytest.CaptureFixture[str],
) -> None:  # type: ignore[no-untyped-def]
    """A damaged shard comes back with the same bytes; the files of the others are not touched."""
    damage(run_copy)
    before = times(run_copy)
    make_shards(world.load(), str(run_copy))
    assert run_digests(run_copy) == run_digests(finished_run) and not leftovers(run_copy)
    changed = {name for name, at in times(run_copy).items() if before.get(name) != at}
    assert {name for name in changed if "-000000" in name or "-000002" in name} == set()
    assert "1 of 3 shards to make" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["manifest.parquet", "README.md", "gallery.png"])
def test_sealing_again(world, run_copy: Path, finished_run: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    """Whatever sealing makes is made again when it is missing, without touching a shard."""
    (run_copy / name).unlink()
    before = times(run_copy)
    make_shards(world.load(), str(run_copy))
    assert (run_copy / name).read_bytes() == (finished_run / name).read_bytes()
    after = times(run_copy)
    assert all(after[tar] == before[tar] for tar in before if tar.endswith(".tar") or "part-" in tar)


def test_an_edited_manifest_is_sealed_again(world, run_copy: Path, finished_run: Path, run_digests: Digests) -> None:  # type: ignore[no-untyped-def]
    data = bytearray((run_copy / "manifest.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (run_copy / "manifest.parquet").write_bytes(data)
    make_shards(world.load(), str(run_copy))
    assert run_digests(run_copy) == run_digests(finished_run)


def test_a_shard_made_after_sealing_without_it(world, run_copy: Path, finished_run: Path, cli) -> None:  # type: ignore[no-untyped-def]
    """A shard made after sealing without it, by a command killed before it sealed again: the next command seals."""
    run = RunDir(run_copy)
    (run_copy / "manifest" / "part-000001.parquet").unlink()
    run.seal(run.info(), [0, 2], {1: "out of reach"})
    for name in ("clean/clean-000001.tar", "dad/dad-000001.tar", "manifest/part-000001.parquet"):
        shutil.copy(finished_run / name, run_copy / name)
    assert "not sealed yet" in cli("status", run_copy).out
    make_shards(world.load(), str(run_copy))
    for name in ("run.json", "manifest.parquet", "README.md"):
        assert (run_copy / name).read_bytes() == (finished_run / name).read_bytes()


def test_a_shard_made_anew_after_sealing(world, run_copy: Path) -> None:  # type: ignore[no-untyped-def]
    """A shard made anew with other bytes or rows by a command killed before it sealed: the next command seals."""
    run = RunDir(run_copy)
    table, record = run.part(1)
    for rows, padding in ((table.to_pylist(), 10240), ([row | {"clean_prob": 0.5} for row in table.to_pylist()], 0)):
        tars = {
            tar.name.partition("/")[0]: (run.store.read(tar.name) + bytes(padding), tar.samples) for tar in record.tars
        }
        run.commit(1, rows, tars, source=record.source, run=record.run)
        assert list(problems(str(run_copy)))
        make_shards(world.load(), str(run_copy))
        assert list(problems(str(run_copy))) == []


def test_other_versions(world, run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    """A run that goes on with another torch says so once and records both; if no shard is made, nothing changes."""
    run, now = RunDir(run_copy), RunDir(run_copy).info().versions
    run.write_info(replace(run.info(), versions=now | {"torch": "2.5.1", "pillow": "10.2.0"}))
    make_shards(world.load(), str(run_copy))
    assert (
        run.info().versions == now | {"torch": "2.5.1", "pillow": "10.2.0"}
        and "began with" not in capsys.readouterr().err
    )
    both = {"torch": f"2.5.1 and {now['torch']}", "pillow": f"10.2.0 and {now['pillow']}"}
    for notes in (1, 0):
        run.withdraw(1)
        make_shards(world.load(), str(run_copy))
        assert run.info().versions == now | both and f"torch {both['torch']}" in (run_copy / "README.md").read_text()
        assert (
            capsys.readouterr().err.count(
                f"began with torch 2.5.1, now {now['torch']}, pillow 10.2.0, now {now['pillow']}: "
            )
            == notes
        )


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[str] | multiprocessing.Process, seconds: float = PATIENCE
) -> None:
    """Look every millisecond until the condition holds or the process has ended."""
    end = time.monotonic() + seconds
    alive = (
        process.is_alive if isinstance(process, multiprocessing.process.BaseProcess) else lambda: process.poll() is None
    )
    while not condition() and alive():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


@pytest.mark.slow
def test_killed_runs_end_in_the_same_bytes(
    world, finished_run: Path, run_digests: Digests, start, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    """kill -9 in the first shard, between shards and while sealing; then the bytes are those of a run without kills."""
    out = tmp_path / "run"
    moments = [
        lambda: (out / "clean").exists(),
        lambda: (out / "manifest" / "part-000000.parquet").exists(),
        lambda: (out / "manifest" / "part-000002.parquet").exists(),
    ]
    for moment in moments:
        process = start("generate", "--recipe", world.recipe, "--out", out)
        wait_until(moment, process)
        time.sleep(random.random() * 0.08)
        process.kill()
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0)
    process = start("generate", "--recipe", world.recipe, "--out", out)
    told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, told
    assert run_digests(out) == run_digests(finished_run) and not leftovers(out)
    assert (out / "run.json").read_bytes() == (finished_run / "run.json").read_bytes()
    assert list(problems(str(out))) == []


@pytest.mark.slow
def test_killed_often_at_random_moments(world, finished_run: Path, run_digests: Digests, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A dozen kills at random moments, of forks of this process: no file with a final name ever has wrong bytes."""
    out, recipe = tmp_path / "run", world.load()
    context, whole = multiprocessing.get_context("fork"), run_digests(finished_run)
    for _ in range(12):
        process = context.Process(target=make_shards, args=(recipe, str(out)))
        process.start()
        wait_until((out / "run.json").exists, process)  # type: ignore[arg-type]
        time.sleep(random.random() * 0.5)
        process.kill()
        process.join()
        for name, digest in run_digests(out).items():
            assert whole[name] == digest, f"{name} stands under its final name with other bytes"
    make_shards(recipe, str(out))
    assert run_digests(out) == whole and not leftovers(out)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_polite_end(world, start, cli, tmp_path: Path, number: signal.Signals) -> None:  # type: ignore[no-untyped-def]
    """SIGTERM or SIGUSR1, as of clusters: status 130, one line, no stack trace, no temporary; finished shards stay."""
    out = tmp_path / "run"
    process = start("generate", "--recipe", world.recipe, "--out", out, "--set", "attack.steps=60")
    wait_until((out / "manifest" / "part-000000.parquet").exists, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.splitlines()[-1] == "interrupted; what was finished is kept, and the same command goes on from there"
    assert not leftovers(out)
    assert "1 of 3 shards done, 2 missing" in cli("status", out).out


def test_stale_temporaries_are_removed(world, run_copy: Path) -> None:  # type: ignore[no-untyped-def]
    """Temporary files of dead processes of this host are removed; those of living ones and other hosts stay."""
    from manifests.files import store

    dead = subprocess.Popen(["true"])
    dead.wait()
    stale = run_copy / "dad" / f".dad-000001.tar.{store.HOST}.{dead.pid}.tmp"
    living = run_copy / "dad" / f".dad-000002.tar.{store.HOST}.{os.getppid()}.tmp"
    foreign = run_copy / "dad" / ".dad-000002.tar.another-host.1.tmp"
    for path in (stale, living, foreign):
        path.write_bytes(b"half")
    make_shards(world.load(), str(run_copy))
    assert not stale.exists() and living.exists() and foreign.exists()


def test_disk_full(world, cli, finished_run: Path, run_digests: Digests, small_disk, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A full disk: status 2, one line that says so, no half files, finished shards stay; with room, the same bytes."""
    whole = sum(path.stat().st_size for path in finished_run.rglob("*.tar"))
    out = small_disk(f"size={whole // 2 // 4096 * 4}k") / "run"
    told = cli("generate", "--recipe", world.recipe, "--out", out)
    assert (
        told.status == 2
        and "the disk is full" in told.err.splitlines()[-1]
        and told.err.splitlines()[-1].startswith("error: ")
    )
    made = run_digests(out)
    assert made and made.items() <= run_digests(finished_run).items() and not leftovers(out)
    small_disk("remount,size=16m")
    assert cli("generate", "--recipe", world.recipe, "--out", out).status == 0
    assert run_digests(out) == run_digests(finished_run)
