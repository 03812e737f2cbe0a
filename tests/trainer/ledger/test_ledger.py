"""The cost ledger: its arithmetic by hand, and one whole run on small real models."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from manifests import RunDir
from shards import TrainingReader
from trainer.ledger import ledger
from trainer.ledger.cost import load_models, main
from trainer.ledger.ledger import Models, Timing, clock, create_learner, ledger_lines, table, whole_bursts
from trainer.methods import NAMES
from trainer.methods.parts.frozen import without_gradient
from trainer.recipe import load
from trainer.run import open_reader
from trainer.step import train_step
from trainer.student import create_student

from ..conftest import CLASSES, SIDE

ROWS = (*NAMES, "advprop, 1 step")


def test_ratios_are_taken_within_a_turn() -> None:
    """A machine that becomes ten times slower after the first turn does not change them."""
    timings = {
        "plain": [Timing(0.010, 0.0), Timing(0.100, 0.5)],
        "dad": [Timing(0.015, 0.0), Timing(0.150, 0.02)],
        "dad_live": [Timing(0.060, 0.0), Timing(0.600, 0.0)],
    }
    told = table(timings, [0.040, 0.400], load("demo", ["epochs=8"]), 0.6)
    assert "| dad | 82.50 | 1.50 [1.50, 1.50] | 1.6 training | 2 | 1.0% |" in told
    assert "| dad_live | 330.00 | 6.00 [6.00, 6.00] | 1.6 training, 1.6 teacher |  | 0.0% |" in told
    assert "DAD from shards: 1.50 x plain (goal: 2.0), 0.25 of DAD with a live teacher" in told
    assert "220.0 ms per clean image, or 4.00 epochs of plain training" in told
    # 1.5 + 4 epochs of making / 8 epochs of training / students
    assert "2.00 with 1, 1.75 with 2, 1.60 with 5, 1.55 with 10" in told


def test_the_clock_leaves_out_the_first_batches_and_counts_clean_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five batches of four clean images. The first two come late; the others come in 1 second and train in 3."""
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


def test_no_method_reads_what_another_has_read(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever came second would find the samples in memory. Each turn begins with another method."""
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
    models = Models({}, lambda _x, _y: None)
    settings = load("demo", [f"shards={tiny_run}", "batch=10", "student=test_vit", "threads=1"])
    timings, generation = ledger.measure(settings, models, torch.device("cpu"), steps=1, repeats=3)
    assert len(asked) == len(set(asked)) == 3 * len(timings) and len(generation) == 3
    assert [begun[turn * (len(timings) + 1) + 1] for turn in range(3)] == list(timings)[:3]


@pytest.mark.slow
def test_the_whole_ledger_on_small_models(finished_run: Path) -> None:
    """Every method trains on a real run, with the models that made it."""
    options = ["--recipe", "demo", "--shards", str(finished_run), "--student", "test_resnet", "--steps", "1"]
    settings = ["batch=10", "threads=1", "device=cpu", "precision=fp32"]
    options += ["--repeats", "1", *(part for setting in settings for part in ("--set", setting))]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 0, result.output
    for name in ROWS:
        assert f"\n| {name} |" in result.output
    assert "epochs of plain training" in result.output
    assert "without the recipe's ema" in result.output


def test_untrained_models_of_full_size_stand_in_for_those_of_the_run(finished_run: Path) -> None:
    """A timm model as teacher and a VQGAN f8-16384: what the methods ask, and all of stage 1."""
    settings = load("demo", [f"shards={finished_run}"])
    info = RunDir(finished_run).info()
    models = load_models(settings, info, "test_vit", torch.device("cpu"))
    x = torch.rand(2, 3, SIDE, SIDE)
    assert models.frozen["teacher"](x).shape == (2, len(info.classes))
    images, codes = models.frozen["discretizer"](x)
    assert images.shape == x.shape and codes.shape == (2, SIDE // 8, SIDE // 8) and codes.max() > 8192
    models.generate(x, torch.zeros(2, dtype=torch.long))


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
    assert result.exit_code == 2 and "batch: 20: fast_advprop needs 10 clean images at a time" in result.output
    assert "set it to 40 or more" in result.output


def test_the_ledger_knows_every_method_and_what_the_recipe_shares() -> None:
    """Plain training first, the registry's order; the recipe's temperature and weight where a method has them."""
    shared = ["method.temperature=2", "method.weight=0.3", "method.smoothing=0.1"]
    lines = ledger_lines(load("demo", shared))
    assert [line.name for line in lines if line.name in NAMES] == list(NAMES) and {line.name for line in lines} == set(
        ROWS
    )
    for line in lines:
        given = {name: getattr(line.method, name) for name in ("temperature", "weight") if hasattr(line.method, name)}
        assert given in ({}, {"temperature": 2.0, "weight": 0.3}), line.name


def test_parts_of_a_batch_cost_and_train_as_the_whole(tiny_run: Path) -> None:
    """Stored and live teachers, by the trainer's own step: the losses of the parts add up to that of the batch."""
    torch.manual_seed(0)
    models = Models({"teacher": without_gradient(create_student("test_vit", CLASSES, SIDE))}, lambda _x, _y: None)
    settings = load("demo", [f"shards={tiny_run}", "batch=12", "student=test_vit", "precision=fp32"])
    for line in ledger_lines(settings):
        if line.name not in ("plain", "kd", "dad", "kd_live"):
            continue
        whole = replace(settings, method=line.method)
        batch = next(open_reader(whole).batches(0))
        totals = {stream: len(some.keys) for stream, some in batch.items()}
        losses = []
        for recipe in (whole, replace(whole, accumulate=3)):
            learner = create_learner(recipe, CLASSES, SIDE, 1, models, torch.device("cpu"), bf16=False)
            losses.append(train_step(learner, batch, recipe, totals=totals, rate=0.1, step=0)["loss"].item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-5), line.name
