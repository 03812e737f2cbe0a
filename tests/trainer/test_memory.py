"""Memory that runs out is one line with what to change."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from manifests import UserError
from shards import TrainingReader
from trainer.memory import memory_errors


def die(_images: torch.Tensor, _generator: torch.Generator) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory is short
    raise AssertionError("survived")


def test_a_killed_loader_worker_is_a_user_error(tiny_run: Path) -> None:
    batches = TrainingReader(str(tiny_run), batch_size=8).batches(0, workers=1, transform=die)
    with pytest.raises(UserError, match="a loader process was killed; lower workers"), memory_errors():
        list(batches)


def test_a_tensor_that_does_not_fit_is_a_user_error() -> None:
    with pytest.raises(UserError, match="does not fit into memory; raise accumulate, or lower batch"), memory_errors():
        torch.empty(1 << 60, dtype=torch.uint8)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="size"), memory_errors():
        torch.ones(2) + torch.ones(3)


def misread(_images: torch.Tensor, _generator: torch.Generator) -> torch.Tensor:
    raise RuntimeError("permitted channel values are 1 or 3")


def test_an_error_in_a_loader_worker_is_not_its_death(tiny_run: Path) -> None:
    batches = TrainingReader(str(tiny_run), batch_size=8).batches(0, workers=1, transform=misread)
    with pytest.raises(RuntimeError, match="permitted channel values"), memory_errors():
        list(batches)
