"""The ranks of a job, started by hand as a launcher would, and what they left and said."""

from __future__ import annotations

import csv
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from trainer.checkpoint import METRICS

from ...patience import PATIENCE

LAUNCHERS = ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS")  # variables of launchers
Ranks = Callable[..., list[subprocess.Popen[str]]]  # (world, *arguments of Python) -> a process for each rank


def command(shards: Path, out: Path, *overrides: str) -> list[str]:
    base = [
        f"shards={shards}",
        "student=test_resnet",
        "validation=null",
        "precision=fp32",
        "threads=1",
        "device=cpu",
        "epochs=2",
        "batch=8",
    ]
    return ["-m", "trainer", "train", "--out", str(out), *(part for o in (*base, *overrides) for part in ("--set", o))]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def told(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    """Exit statuses, and every line with ``error:``, a stack trace or a Python warning that any rank wrote."""
    lines = [line for process in processes for line in process.communicate(timeout=PATIENCE)[1].splitlines()]
    lines = [line for line in lines if line.startswith(("error:", "Traceback")) or "Warning: " in line]
    return [process.returncode for process in processes], lines


def metrics(out: Path) -> list[dict[str, float]]:
    with open(out / METRICS) as file:
        return [
            {name: float(value) for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)
        ]
