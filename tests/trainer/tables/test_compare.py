"""Students side by side: one that cannot be scored does not stand in the way of the others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from manifests import UserError
from trainer.checkpoint import BEST
from trainer.loop import train
from trainer.recipe import load
from trainer.tables.compare import compare

from ..conftest import write_image_set


@pytest.fixture
def runs(tiny_run: Path, tmp_path: Path) -> Path:
    """A folder of two students, ``first`` and ``second``, beside ``data`` with one image set."""
    settings = [
        f"shards={tiny_run}",
        "student=test_resnet",
        "epochs=1",
        "batch=8",
        "validation=null",
        "precision=fp32",
        "threads=1",
    ]
    train(load("demo", settings), str(tmp_path / "runs" / "first"))
    shutil.copytree(tmp_path / "runs" / "first", tmp_path / "runs" / "second")
    write_image_set(tmp_path / "data" / "val")
    return tmp_path / "runs"


def test_a_damaged_student_is_left_out_with_its_reason(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "first" / BEST).write_bytes(b"damaged")
    compare([str(runs)], tmp_path / "data", str(tmp_path / "reports"))
    told = capsys.readouterr()
    assert (
        "first: left out: " in told.err
        and f"{BEST}: not a readable checkpoint" in told.err
        and "second: left out" not in told.err
    )
    assert "| test_resnet dad | 1 |" in (tmp_path / "reports" / "report.md").read_text()
    (runs / "second" / BEST).write_bytes(b"damaged")
    with pytest.raises(UserError, match="no student could be scored"):
        compare([str(runs)], tmp_path / "data", str(tmp_path / "again"))


def test_a_student_counts_once(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named twice, or copied: not two seeds with an error of 0 between them."""
    compare([str(runs), str(runs / "first")], tmp_path / "data", str(tmp_path / "reports"))
    assert "| test_resnet dad | 1 |" in (tmp_path / "reports" / "report.md").read_text()
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "left out" in line]) == 1
    assert any(
        line.startswith(f"{runs / 'second'}: left out: a student of this recipe, shards and seed") for line in lines
    )


def test_image_sets_that_are_missing_are_told_once(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        compare([str(runs)], tmp_path / "nowhere", str(tmp_path / "reports"))
    assert capsys.readouterr().err == ""
