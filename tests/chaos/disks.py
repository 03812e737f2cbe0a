"""Disks that are full or cannot be written, and clocks that jump."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from manifests import RunDir, UserError
from pipeline.generate import make_shards
from pipeline.status import Survey, status_lines

from ..conftest import World, digests
from .kills import check_finished, check_survivors, quietly

DAY = 86_400.0


@contextlib.contextmanager
def tmpfs(place: Path, size: int) -> Iterator[Path]:
    """A real file system of ``size`` bytes. Raises CalledProcessError where it may not be mounted."""
    place.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True, capture_output=True, text=True
    )
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def _remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True, capture_output=True, text=True)


def disk_full(world: World, folder: Path, whole: dict[str, str]) -> None:
    """The disk fills up in the middle: one line that says so, nothing half-written; with room again the same bytes."""
    size = sum(path.stat().st_size for path in (folder / "whole").rglob("*.tar"))
    with tmpfs(folder / "small", size // 2 // 4096 * 4096) as disk:
        _expect(world, disk / "run", "the disk is full")
        check_survivors(disk / "run", whole)
        _remount(disk, "size=64m")
        check_finished(world, disk / "run", whole)


def read_only(world: World, folder: Path, whole: dict[str, str]) -> None:
    """The disk turns read-only between two commands: one line that says so; writable again, the same bytes."""
    with tmpfs(folder / "fixed", 64 << 20) as disk:
        quietly(make_shards, world.load(), str(disk / "run"))
        (disk / "run" / "manifest" / "part-000001.parquet").unlink()
        _remount(disk, "ro")
        _expect(world, disk / "run", "cannot write here")
        _remount(disk, "rw")
        check_finished(world, disk / "run", whole)


def clock_set_back(world: World, folder: Path, whole: dict[str, str]) -> None:
    """A run is killed, and the clock is a day earlier when it goes on, here and in the times of all its files."""
    out = folder / "yesterday"
    process = multiprocessing.get_context("fork").Process(target=quietly, args=(make_shards, world.load(), str(out)))
    process.start()
    while process.is_alive() and not (out / "manifest").exists():
        time.sleep(0.001)
    process.kill()
    process.join()
    for path in out.rglob("*"):
        os.utime(path, (time.time() + DAY, time.time() + DAY))
    now, time.time = time.time, lambda: now() - DAY  # type: ignore[assignment]
    try:
        lines = status_lines(str(out), Survey(RunDir(out)).look())
        assert "-" not in "".join(line for line in lines if "to go" in line), lines
        check_finished(world, out, whole)
    finally:
        time.time = now
    assert digests(out) == whole


def _expect(world: World, out: Path, words: str) -> None:
    try:
        quietly(make_shards, world.load(), str(out))
    except UserError as error:
        assert words in str(error) and "\n" not in str(error), error
    else:
        raise AssertionError(f"nobody noticed: {words}")
