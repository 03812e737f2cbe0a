"""What training measures: numbers that are not finite stop it by name, and logs keep what was learned."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from manifests import UserError
from shards import TrainingReader
from trainer.checkpoint import BEST, StudentDir
from trainer.loop import Hooks, train
from trainer.metrics import Meter, to_csv
from trainer.student import create_student

from .conftest import CLASSES, SIDE, write_image_set
from .test_loop import STUDENT, interrupted, recipe, step_once


def test_a_loss_that_is_not_finite_is_found_when_read_and_named(tiny_run: Path) -> None:
    """The step does not wait for the device: the meter finds the first bad step since it was last read."""
    reader = TrainingReader(str(tiny_run), batch_size=8)
    batches = list(reader.batches(0))[:3]
    batches[1]["dad"].logits[0, 0] = float("nan")
    student = create_student(STUDENT, CLASSES, SIDE)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    meter = Meter()
    for step, batch in enumerate(batches):
        meter.add(step, step_once(student, optimizer, batch, recipe(tiny_run), reader.sizes(0)), batch)
    with pytest.raises(UserError, match=f"the loss became nan at step 1; .*{batches[1]['dad'].keys[0]}"):
        meter.read()


def test_a_gradient_that_is_not_finite_is_found_too(tiny_run: Path) -> None:
    """A finite loss whose gradient overflows: the next loss would show it, with weights that are spoiled already."""
    reader = TrainingReader(str(tiny_run), batch_size=8)
    batch = next(iter(reader.batches(0)))
    student = create_student(STUDENT, CLASSES, SIDE)
    student.model.fc.weight.register_hook(lambda gradient: gradient * float("inf"))
    meter = Meter()
    meter.add(
        0,
        step_once(student, torch.optim.SGD(student.parameters(), lr=0.1), batch, recipe(tiny_run), reader.sizes(0)),
        batch,
    )
    with pytest.raises(UserError, match=rf"the gradient became (nan|inf) at step 0; .*{batch['clean'].keys[0]}"):
        meter.read()


def test_of_many_suspects_the_first_are_named(tiny_run: Path) -> None:
    reader = TrainingReader(str(tiny_run), batch_size=24)
    batch = next(iter(reader.batches(0)))
    meter = Meter()
    meter.add(0, {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(float("inf"))}, batch)
    keys = batch["clean"].keys
    with pytest.raises(
        UserError, match=rf"gradient became inf .*{keys[0]}.*{keys[15]} and {24 + len(batch['dad'].keys) - 16} more"
    ):
        meter.read()


@pytest.mark.parametrize("minutes", [0, 60])
def test_spoiled_weights_are_never_saved(tiny_run: Path, tmp_path: Path, minutes: int) -> None:
    """A learning rate that blows up: training stops by name, and what it left on disk is finite."""
    settings = recipe(
        tiny_run,
        "optimizer.name=sgd",
        "optimizer.lr=1e39",
        "optimizer.clip=null",
        "batch=40",
        f"checkpoint_minutes={minutes}",
    )  # one step an epoch
    with pytest.raises(UserError, match=r"the weights are no longer finite at step \d+; lower optimizer.lr"):
        train(settings, str(tmp_path / "student"))
    state = StudentDir(tmp_path / "student").load_last()
    assert state is None or all(torch.isfinite(value.float()).all() for value in state["student"].values())
    assert not (tmp_path / "student" / BEST).exists()


def test_counts_are_written_in_full() -> None:
    assert to_csv([{"epoch": 0, "loss": 1 / 3, "images": 1281167}]) == "epoch,loss,images\n0,0.333333,1281167\n"


def test_wandb_that_is_not_installed_is_told_before_anything_begins(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match=r"^wandb: is not installed \(.*\); pip install '\.\[wandb\]', or --set wandb=null"
    ):
        train(recipe(tiny_run, "wandb=some-project"), str(tmp_path / "student"))
    assert not (tmp_path / "student").exists()


def test_wandb_logs_offline(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an account or a network: the run lies on disk, and training does not depend on it."""
    pytest.importorskip("wandb", reason="needs pip install '.[wandb]'")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(recipe(tiny_run, "wandb=some-project", "epochs=1"), str(tmp_path / "student"))
    assert list((tmp_path / "student").rglob("*.wandb"))


def test_points_are_on_disk_when_training_stops(tiny_run: Path, tmp_path: Path) -> None:
    """Stopped in its second epoch by spoiled weights, far sooner than TensorBoard would write by itself."""
    settings = recipe(tiny_run, "optimizer.name=sgd", "optimizer.lr=1e39", "optimizer.clip=null", "batch=40")
    with pytest.raises(UserError, match="no longer finite"):
        train(settings, str(tmp_path / "student"))
    events = EventAccumulator(str(tmp_path / "student" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("lr")] == [0]


def test_every_start_keeps_the_points_of_those_before(tiny_run: Path, tmp_path: Path) -> None:
    """Three epochs of six steps in three starts."""
    settings = recipe(tiny_run, "epochs=3", f"validation={write_image_set(tmp_path / 'val')}")
    for _ in range(3):
        with pytest.raises(InterruptedError):
            train(settings, str(tmp_path / "student"), Hooks(after_epoch=interrupted))
    events = EventAccumulator(str(tmp_path / "student" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("val_top1")] == [5, 11, 17]
