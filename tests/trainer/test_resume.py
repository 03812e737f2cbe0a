"""Stopped and started again: training goes on to the bit, or says why it cannot."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from manifests import RunDir, UserError
from shards import Batch
from trainer.checkpoint import BEST, LAST, StudentDir
from trainer.loop import Hooks, train
from trainer.run import Training

from .conftest import PER_SHARD, write_run
from .test_loop import interrupted, recipe


@pytest.mark.parametrize(
    "change",
    ["forward=separate", "ema=0", "sync_bn=true", "optimizer.name=lamb", "input=48", "optimizer.layer_decay=0.7"],
)
def test_options_train_and_resume_to_the_bit(tiny_run: Path, tmp_path: Path, change: str) -> None:
    """Two epochs at once, or one epoch, its checkpoint, and the other."""
    whole, halved = recipe(tiny_run, change), tmp_path / "halved"
    train(whole, str(tmp_path / "whole"))
    with pytest.raises(InterruptedError):
        train(whole, str(halved), Hooks(after_epoch=interrupted))
    train(whole, str(halved))
    left, right = (StudentDir(folder).load_last() for folder in (tmp_path / "whole", halved))
    assert left is not None and right is not None
    assert all(torch.equal(left["student"][name], right["student"][name]) for name in left["student"])


def test_a_start_that_failed_does_not_stand_in_the_way(tiny_run: Path, tmp_path: Path) -> None:
    """Ctrl-C before the first checkpoint, then another recipe: there was nothing to lose."""
    out = tmp_path / "student"
    train(recipe(tiny_run, "epochs=1"), str(out))
    (out / LAST).unlink()
    with pytest.raises(UserError, match="another recipe"):  # the best weights are there
        train(recipe(tiny_run, "epochs=1", "method.temperature=2"), str(out))
    (out / BEST).unlink()
    train(recipe(tiny_run, "epochs=1", "method.temperature=2"), str(out))
    with pytest.raises(UserError, match="'adamw'"):
        train(recipe(tiny_run, "optimizer.name=adamww"), str(tmp_path / "other"))


def test_shards_sealed_anew_begin_the_epoch_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sealed without a shard, stopped in mid-epoch, healed: the epoch has other samples, and each is seen once."""
    shards = RunDir(write_run(tmp_path / "run"))
    info, left_out = shards.info(), [tmp_path / "run" / stream / f"{stream}-000002.tar" for stream in ("clean", "dad")]
    kept = [tar.read_bytes() for tar in left_out]
    shards.seal(replace(info, counts=None, manifest_sha256=None), (0, 1), {2: "failed 3 times"})
    settings = recipe(tmp_path / "run", "epochs=1", "checkpoint_minutes=0", "batch=4")
    seen: list[str] = []

    def look(_run: Training, batch: Batch) -> None:
        if len(seen) == 12 and shards.info().missing:
            raise InterruptedError
        seen.extend(batch["clean"].keys)

    hooks = Hooks(before_step=look)
    with pytest.raises(InterruptedError):
        train(settings, str(tmp_path / "student"), hooks)
    assert "was sealed without 1 of its shards" in capsys.readouterr().err
    for tar, data in zip(left_out, kept, strict=True):
        tar.write_bytes(data)
    shards.seal(replace(info, counts=None, manifest_sha256=None), (0, 1, 2))
    seen.clear()
    train(settings, str(tmp_path / "student"), hooks)
    assert "sealed anew since the last checkpoint; the epoch begins again" in capsys.readouterr().err
    assert len(seen) == len(set(seen)) == 3 * PER_SHARD // 4 * 4


def test_damaged_checkpoint_is_named(tiny_run: Path, tmp_path: Path) -> None:
    train(recipe(tiny_run, "epochs=1"), str(tmp_path / "student"))
    path = tmp_path / "student" / LAST
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"last\.pt"):
        train(recipe(tiny_run, "epochs=1"), str(tmp_path / "student"))
    shutil.rmtree(tmp_path / "student")
