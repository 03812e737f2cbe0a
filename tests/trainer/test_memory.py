"""Memory that runs out is one line with what to change."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from manifests import UserError
from shards import TrainingReader
from trainer.memory import memory_errors

from ..processes import run
from .conftest import write_image_set


def die(_images: torch.Tensor, _generator: torch.Generator) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory is short
    raise AssertionError("survived")


def test_a_killed_loader_worker_is_a_user_error(tiny_run: Path) -> None:
    batches = TrainingReader(str(tiny_run), batch_size=8).batches(0, workers=1, transform=die)
    with pytest.raises(UserError, match="a loader process was killed; lower workers"), memory_errors():
        list(batches)


@pytest.mark.parametrize("take", [lambda size: torch.empty(size, dtype=torch.uint8), bytearray])
def test_what_does_not_fit_is_a_user_error(take: Callable[[int], object]) -> None:
    """A tensor, and an object of Python's."""
    with (
        pytest.raises(UserError, match=r"does not fit into memory; raise accumulate, or lower batch \(.+\)"),
        memory_errors(),
    ):
        take(1 << 60)


LIMITED = """
import ctypes, resource, sys
from pathlib import Path
from trainer import loop
from trainer.evaluation.kept import evaluate_run
from trainer.checkpoint import StudentDir
from trainer.recipe import load

ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX: every thread's own arena would take from the limit

def leave(mib):
    used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData:")) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + mib * 2**20,) * 2)

run, data, out, *settings = sys.argv[1:]
base = ["epochs=1", "batch=8", "validation=null", "precision=fp32", "threads=1"]
recipe = load("demo", [f"shards={run}", *base, *settings])
"""


def run_out_of_memory(program: str, *arguments: object) -> str:
    """The last line that a program says of which memory is withheld."""
    done = run("-c", LIMITED + program, *arguments)
    assert done.returncode == 1, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
def test_a_student_that_does_not_fit_is_a_user_error(tiny_run: Path, tmp_path: Path) -> None:
    """485 MiB of weights are made; their average, as much again, no longer fits."""
    said = run_out_of_memory(
        "leave(750); loop.train(recipe, out)",
        tiny_run,
        "-",
        tmp_path / "student",
        "student=wide_resnet101_2",
        "ema=0.9",
    )
    assert said.startswith(
        "manifests.errors.UserError: the student does not fit into memory; free some, or choose a smaller one ("
    ), said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
def test_a_student_that_cannot_be_scored_for_memory_is_a_user_error(tiny_run: Path, tmp_path: Path) -> None:
    """250 images of 256 x 256 pixels take 190 MiB as numbers, and seven times that on their way through the student.

    Training, whose batches are of 8, validates on the same images with as little memory.
    """
    data = tmp_path / "data"
    settings = ["student=test_resnet", "input=256", f"validation={write_image_set(data / 'val', images=250)}"]
    program = "leave(800); loop.train(recipe, out); evaluate_run(StudentDir(out), Path(data))"
    said = run_out_of_memory(program, tiny_run, data, tmp_path / "student", *settings)
    assert said.startswith(
        "manifests.errors.UserError: the student does not fit into memory to be scored; free some"
    ), said


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="size"), memory_errors():
        torch.ones(2) + torch.ones(3)


def misread(_images: torch.Tensor, _generator: torch.Generator) -> torch.Tensor:
    raise RuntimeError("permitted channel values are 1 or 3")


def test_an_error_in_a_loader_worker_is_not_its_death(tiny_run: Path) -> None:
    batches = TrainingReader(str(tiny_run), batch_size=8).batches(0, workers=1, transform=misread)
    with pytest.raises(RuntimeError, match="permitted channel values"), memory_errors():
        list(batches)
