"""Ranks that end with their test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from ...processes import launch
from .jobs import LAUNCHERS, Ranks, free_port


@pytest.fixture
def alone() -> dict[str, str]:
    """The environment without traces of a launcher."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHERS}


@pytest.fixture
def ranks(alone: dict[str, str]) -> Iterator[Ranks]:
    """Start the ranks of a job as a launcher would; all are ended with the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(world: int, *arguments: str) -> list[subprocess.Popen[str]]:
        place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(world):
            environment = alone | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(launch(*arguments, env=environment))
        return processes[-world:]

    yield start
    for process in processes:
        process.kill()
        process.communicate()
