"""A tiny sealed run directory, written through the contract alone: stage 2 needs nothing of stage 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..fake_runs import CLASSES, NAMES, PER_SHARD, SHARDS, SIDE, write_image_set
from ..fake_runs import write_coloured_run as write_run

__all__ = ["CLASSES", "NAMES", "PER_SHARD", "SHARDS", "SIDE", "write_image_set", "write_run"]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_run(tmp_path_factory.mktemp("tiny") / "run")
