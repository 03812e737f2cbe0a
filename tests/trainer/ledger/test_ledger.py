"""The cost ledger: its arithmetic by hand, and one whole run on small real models."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from shards import TrainingReader
from trainer.ledger import ledger
from trainer.ledger.cost import main
from trainer.ledger.ledger import PAPER, Models, Timing, clock, schemes, table, totals_of, whole_bursts
from trainer.methods.attacks import no_discretizer
from trainer.recipe import load
from trainer.run import open_reader
from trainer.step import split_batch
from trainer.student import create_student

from ..conftest import CLASSES, SIDE

ROWS = ("plain", "KD from shards", "DAD from shards", "KD, live teacher", "DAD, live teacher", "Fast AdvProp-1", *PAPER)


def test_ratios_are_taken_within_a_turn() -> None:
    """A machine that becomes ten times slower after the first turn does not change them."""
    timings = {
        "plain": [Timing(0.010, 0.0), Timing(0.100, 0.5)],
        "DAD from shards": [Timing(0.015, 0.0), Timing(0.150, 0.02)],
        "DAD, live teacher": [Timing(0.060, 0.0), Timing(0.600, 0.0)],
    }
    told = table(timings, [0.040, 0.400], epochs=8)
    assert "| DAD from shards | 82.50 | 1.50 [1.50, 1.50] | 2 | 1.0% |" in told
    assert "| DAD, live teacher | 330.00 | 6.00 [6.00, 6.00] |  | 0.0% |" in told
    assert "DAD from shards: 1.50 x plain (goal: 2.0), 0.25 of the scheme with a live teacher" in told
    assert "220.0 ms per clean image, or 4.00 epochs of plain training" in told
    # 1.5 + 4 epochs of making / 8 epochs of training / students
    assert "2.00 with 1, 1.75 with 2, 1.60 with 5, 1.55 with 10" in told


def test_the_clock_leaves_out_the_first_batches_and_counts_clean_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five batches of four clean images; the first two are slow to come, the others take 1 second to come and 3 to train on."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def batches() -> Iterator[Any]:
        for number in range(5):
            now[0] += 10 if number < 2 else 1
            yield {"clean": SimpleNamespace(keys=["k"] * 4)}

    def step(_batch: Any) -> None:
        now[0] += 3

    timing = clock(batches(), step, 2, torch.device("cpu"))
    assert timing.seconds == pytest.approx(3 * (1 + 3) / 12)
    assert timing.waiting == pytest.approx(1 / 4)


@pytest.mark.parametrize(("steps", "workers", "timed"), [(5, 0, 5), (5, 1, 5), (5, 12, 24), (30, 12, 36), (1, 2, 4)])
def test_workers_deliver_in_bursts_and_whole_ones_are_timed(steps: int, workers: int, timed: int) -> None:
    assert whole_bursts(steps, workers) == timed


def test_no_scheme_reads_what_another_has_read(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever came second would find the samples in memory. Each turn begins with another scheme."""
    asked: list[int] = []
    begun: list[str] = []
    read = TrainingReader.batches

    def batches(reader: TrainingReader, epoch: int, *given: Any, **named: Any) -> Iterator[Any]:
        if named:  # not of the generation
            asked.append(epoch)
        return read(reader, epoch, *given, **named)

    def note(_batches: Any, step: Any, *_: Any) -> Timing:
        begun.append(step.args[0].name if isinstance(step, partial) else "generation")
        return Timing(1, 0)

    monkeypatch.setattr(TrainingReader, "batches", batches)
    monkeypatch.setattr(ledger, "clock", note)
    models = Models(torch.nn.Identity(), no_discretizer, lambda _x, _y: None)
    settings = load("demo", [f"shards={tiny_run}", "batch=10", "student=test_vit", "threads=1"])
    timings, generation = ledger.measure(settings, models, torch.device("cpu"), steps=1, repeats=3)
    assert len(asked) == len(set(asked)) == 3 * len(timings) and len(generation) == 3
    assert [begun[turn * (len(timings) + 1) + 1] for turn in range(3)] == list(timings)[:3]


@pytest.mark.slow
@pytest.mark.parametrize("models", ["run", "random"])
def test_the_whole_ledger_on_small_models(finished_run: Path, models: str) -> None:
    """Every scheme trains on a real run, with the models that made it, or with untrained ones of full size."""
    options = [
        "--recipe",
        "demo",
        "--shards",
        str(finished_run),
        "--student",
        "test_resnet",
        "--steps",
        "1",
        "--repeats",
        "1",
    ]
    settings = ["batch=10", "threads=1", "device=cpu", "precision=fp32"]
    if models == "random":
        options += ["--random", "test_vit"]
    result = CliRunner().invoke(main, [*options, *(part for setting in settings for part in ("--set", setting))])
    assert result.exit_code == 0, result.output
    for name in ROWS:
        assert f"\n| {name} |" in result.output
    assert "epochs of plain training" in result.output
    assert "without the recipe's ema" in result.output


def test_too_few_batches_are_a_user_error(finished_run: Path) -> None:
    options = [
        "--recipe",
        "demo",
        "--shards",
        str(finished_run),
        "--student",
        "test_resnet",
        "--steps",
        "50",
        "--set",
        "batch=10",
    ]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 2 and "batches, a measurement takes 51; lower batch or --steps" in result.output


def test_an_unknown_teacher_is_a_user_error(finished_run: Path) -> None:
    result = CliRunner().invoke(
        main, ["--recipe", "demo", "--shards", str(finished_run), "--random", "vit_large_patch14_clip_225"]
    )
    assert result.exit_code == 2 and "did you mean 'vit_large_patch14_clip_224'" in result.output


def test_parts_too_small_for_fast_advprop_are_a_user_error(finished_run: Path) -> None:
    options = [
        "--recipe",
        "demo",
        "--shards",
        str(finished_run),
        "--student",
        "test_resnet",
        "--set",
        "batch=20",
        "--set",
        "accumulate=4",
    ]
    result = CliRunner().invoke(main, options)
    assert (
        result.exit_code == 2 and "batch: 20 in 4 parts; " in result.output and "set it to 40 or more" in result.output
    )


def test_parts_of_a_batch_cost_and_train_as_the_whole(tiny_run: Path) -> None:
    """Stored and live schemes: the losses of the parts add up to that of the batch."""
    torch.manual_seed(0)
    student, teacher = (create_student("test_vit", CLASSES, SIDE) for _ in range(2))
    models = Models(teacher, no_discretizer, lambda _x, _y: None)
    settings = load("demo", [f"shards={tiny_run}", "batch=12"])
    batch = next(open_reader(settings, "dad").batches(0))
    totals = totals_of(batch)
    lines = {scheme.name: scheme for scheme in schemes(settings, student, student, models, torch.device("cpu"))}
    for name in ("plain", "KD from shards", "DAD from shards", "KD, live teacher"):
        whole = lines[name].loss(batch, totals).item()
        assert sum(lines[name].loss(part, totals).item() for part in split_batch(batch, 3)) == pytest.approx(
            whole, rel=1e-5
        )
