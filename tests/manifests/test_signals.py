"""Told to stop, training finishes its step and writes a checkpoint; told twice, it stops at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from manifests.signals import SIGNALS, told_to_stop
from trainer.checkpoint import LAST, StudentDir
from trainer.loop import Hooks, train
from trainer.run import Training

from ..trainer.test_loop import assert_equal_runs, recipe


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> None:
    """Also where the tests run in the background, which ignores SIGINT. The suite puts handlers back."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_nothing_is_lost(number: int, tiny_run: Path, tmp_path: Path, capfd: Any) -> None:
    """The signal comes within step 4 of 6, long before a checkpoint is due, to the trainer and to its loader, as
    launchers send it to all processes of a job; the same command ends in the weights of an untroubled run."""
    settings = recipe(tiny_run, "epochs=1", "checkpoint_minutes=1000", "workers=1")
    train(settings, str(tmp_path / "whole"))
    steps = 0

    def step(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 4:
            everyone = [os.getpid(), *(loader.pid for loader in multiprocessing.active_children())]
            assert len(everyone) == 2
            subprocess.run(["kill", f"-{int(number)}", *map(str, everyone)], check=True)
            time.sleep(0.2)

    with pytest.raises(KeyboardInterrupt):
        train(settings, str(tmp_path / "stopped"), Hooks(before_step=step))
    assert "stopping after this step" in capfd.readouterr().err
    state = StudentDir(tmp_path / "stopped").load_last()
    assert state is not None and (state["progress"]["step"], steps) == (4, 4)
    train(settings, str(tmp_path / "stopped"), Hooks(before_step=step))
    assert steps == 6
    assert_equal_runs(tmp_path / "whole", tmp_path / "stopped")


def test_told_while_the_last_checkpoint_of_an_epoch_is_written(tiny_run: Path, tmp_path: Path) -> None:
    """No step of this epoch is left to notice it in: training stops all the same, before the next."""

    def told(run: Training) -> None:
        if (run.at.epoch, run.at.step) == (0, run.reader.steps):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(recipe(tiny_run, "epochs=3"), str(tmp_path / "stopped"), Hooks(before_save=told))
    state = StudentDir(tmp_path / "stopped").load_last()
    assert state is not None and (state["progress"]["epoch"], state["progress"]["step"]) == (0, 6)


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_an_epoch_is_saved_before_it_is_validated(tiny_run: Path, tmp_path: Path) -> None:
    settings = recipe(tiny_run, "epochs=1", "checkpoint_minutes=1000")
    train(settings, str(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(settings, str(tmp_path / "stopped"), Hooks(before_validation=interrupted))
    train(settings, str(tmp_path / "stopped"), Hooks(before_step=interrupted))  # no step is left to do
    assert_equal_runs(tmp_path / "whole", tmp_path / "stopped")
    columns = [
        (tmp_path / name / "metrics.csv").read_text().splitlines()[1].split(",")[:-1] for name in ("whole", "stopped")
    ]
    assert columns[0] == columns[1]


def test_the_second_signal_acts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), told_to_stop(quiet=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")


def test_handlers_are_those_of_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with told_to_stop(quiet=True) as stop:
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before and not stop.asked


def test_before_the_first_step_there_is_nothing_to_keep(tiny_run: Path, tmp_path: Path) -> None:
    """An interrupt while things load is not held back."""
    told = Hooks(before_training=lambda _: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(recipe(tiny_run), str(tmp_path / "student"), told)
    assert not (tmp_path / "student" / LAST).exists()
