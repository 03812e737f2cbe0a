"""Checkpoints: what is damaged on the disk is never trained on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from manifests import UserError
from trainer.checkpoint import LAST, StudentDir


def test_no_flipped_bit_of_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    """Flipped anywhere: in a tensor, in the pickle, in the names and places of the archive; or without effect, in its padding."""
    run = StudentDir(tmp_path)
    state = {"student": {"weight": torch.arange(2000.0), "bias": torch.ones(3)}, "progress": {"epoch": 1, "rows": [{"loss": 0.5}]}}
    run.save_last(state)
    sound, draw, refused = (tmp_path / LAST).read_bytes(), random.Random(0), 0
    for place in [*range(0, 1000, 7), *draw.sample(range(len(sound)), 200), *range(len(sound) - 1200, len(sound), 7)]:
        data = bytearray(sound)
        data[place] ^= 1 << draw.randrange(8)
        (tmp_path / LAST).write_bytes(data)
        try:
            loaded = run.load_last()
        except UserError as error:
            assert str(error).startswith(f"{tmp_path / LAST}: not a readable checkpoint; delete it to start again (")
            refused += 1
        else:
            assert str(loaded) == str(state) and torch.equal(loaded["student"]["weight"], state["student"]["weight"]), place
    assert refused > 200


def test_a_checkpoint_stays_readable_by_torch_alone(tmp_path: Path) -> None:
    StudentDir(tmp_path).save_last({"student": {"weight": torch.ones(3)}})
    assert torch.equal(torch.load(tmp_path / LAST, weights_only=True)["student"]["weight"], torch.ones(3))


def test_a_directory_behind_a_url_is_refused() -> None:
    with pytest.raises(UserError, match=r"^memory://x/y: a student's directory is a local folder, not a URL"):
        StudentDir("memory://x/y")
