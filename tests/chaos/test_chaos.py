"""The short version of ``make chaos``: a few kills in forks of this process, other ones every time; and the disks."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import World, digests
from .__main__ import disturb
from .disks import clock_set_back, disk_full, read_only


@pytest.mark.slow
def test_a_few_kills(world: World, finished_run: Path, tmp_path: Path) -> None:
    seed = random.randrange(2**31)
    kinds = ("command, at any moment", "command, around a rename", "command, in a Parquet file")
    survived = disturb(world, tmp_path, digests(finished_run), 5, random.Random(seed), kinds)
    assert survived.total() == 5, f"seed {seed}"


@pytest.mark.parametrize("test", [disk_full, read_only, clock_set_back])
def test_disks_and_clocks(
    world: World, finished_run: Path, tmp_path: Path, test: Callable[[World, Path, dict[str, str]], None]
) -> None:
    shutil.copytree(finished_run, tmp_path / "whole")
    try:
        test(world, tmp_path, digests(finished_run))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"needs to mount a tmpfs, which is not permitted here: {error.stderr.strip()}")
