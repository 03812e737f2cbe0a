"""One step: parts of a batch add up to the whole; joint and separate forwards normalise by what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from shards import Batch, TrainingReader
from trainer.recipe import Recipe, load
from trainer.step import Learner, split_batch, student_logits, train_step
from trainer.student import Student, create_student

from .conftest import CLASSES, SIDE


def recipe(run: Path, *overrides: str) -> Recipe:
    return load("demo", [f"shards={run}", "precision=fp32", "optimizer.clip=null", *overrides])


def student_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return create_student(kind, CLASSES, SIDE).train()


def stepped(
    student: nn.Module, batch: Batch, settings: Recipe, totals: dict[str, int]
) -> tuple[nn.Module, dict[str, float]]:
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    learner = Learner(student, student, optimizer, torch.device("cpu"), bf16=False)
    losses = train_step(learner, batch, settings, totals=totals, rate=0.1, step=3)
    return student, {name: value.item() for name, value in losses.items()}


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulation_adds_up_to_the_whole_batch(tiny_run: Path, parts: int) -> None:
    """Also when parts differ in size, for each term; batch norm's statistics would be those of a part."""
    reader = TrainingReader(str(tiny_run), batch_size=8)
    batch = next(iter(reader.batches(0)))
    whole, losses = stepped(student_of("test_vit"), batch, recipe(tiny_run), reader.sizes(0))
    accumulated, sums = stepped(student_of("test_vit"), batch, recipe(tiny_run, f"accumulate={parts}"), reader.sizes(0))
    assert losses == pytest.approx(sums, rel=1e-5)
    for left, right in zip(whole.parameters(), accumulated.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_the_losses_of_two_ranks_add_up_to_those_of_one(tiny_run: Path) -> None:
    """Each divides by the samples of the whole global batch, so sums over ranks are the global means."""
    alone = TrainingReader(str(tiny_run), batch_size=8)
    _, expected = stepped(student_of("test_vit"), next(iter(alone.batches(0))), recipe(tiny_run), alone.sizes(0))
    sums: dict[str, float] = {}
    for rank in range(2):
        reader = TrainingReader(str(tiny_run), batch_size=8, rank=rank, world=2)
        _, losses = stepped(student_of("test_vit"), next(iter(reader.batches(0))), recipe(tiny_run), reader.sizes(0))
        sums = {name: sums.get(name, 0.0) + value for name, value in losses.items()}
    del sums["grad_norm"], expected["grad_norm"]  # of the gradient that the ranks have averaged
    assert sums == pytest.approx(expected, rel=1e-5)


def test_parts_hold_every_sample_once(tiny_run: Path) -> None:
    batch = next(iter(TrainingReader(str(tiny_run), batch_size=8).batches(0)))
    parts = list(split_batch(batch, 3))
    for stream, some in batch.items():
        assert [key for part in parts for key in part[stream].keys] == some.keys
        assert torch.equal(torch.cat([part[stream].images for part in parts]), some.images)


@pytest.mark.parametrize("how", ["joint", "separate"])
def test_batch_norm_sees_what_the_recipe_says(how: str) -> None:
    """joint: statistics of the mixture. separate: of each stream, and the running mean follows both in turn."""
    norm = nn.BatchNorm2d(3, momentum=0.1).train()
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(8, 3, 4, 4, generator=generator)
    dad = torch.rand(4, 3, 4, 4, generator=generator) + 5
    learner = Learner(norm, norm, torch.optim.SGD(norm.parameters()), torch.device("cpu"), bf16=False)
    outputs = student_logits(learner, how, clean, dad)
    means = [half.mean((0, 2, 3)) for half in (clean, dad)]
    if how == "joint":
        mean = torch.cat([clean, dad]).mean((0, 2, 3))
        torch.testing.assert_close(norm.running_mean, 0.1 * mean)
        assert outputs[0].mean() < -0.1 and outputs[1].mean() > 0.1
    else:
        torch.testing.assert_close(norm.running_mean, 0.9 * 0.1 * means[0] + 0.1 * means[1])
        assert all(abs(half.mean().item()) < 1e-5 for half in outputs)


def test_steps_with_mixing_repeat_to_the_bit_and_differ_by_step(tiny_run: Path) -> None:
    reader = TrainingReader(str(tiny_run), batch_size=8)
    batch = next(iter(reader.batches(0)))
    settings = recipe(tiny_run, "augmentation.mixup=0.8", "augmentation.cutmix=1.0", "drop_path=0.2")
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        student = create_student("test_resnet", CLASSES, SIDE, drop_path=0.2).train()
        runs.append(stepped(student, batch, settings, reader.sizes(0)))
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True))
    _, plain = stepped(student_of("test_resnet"), batch, recipe(tiny_run), reader.sizes(0))
    assert plain != runs[0][1]


def test_drop_path_and_dropout_reach_the_model() -> None:
    student = create_student("test_resnet", CLASSES, SIDE, drop_path=0.3, dropout=0.5)
    assert isinstance(student, Student) and student.model.drop_rate == 0.5
    assert any(getattr(module, "drop_prob", 0) == pytest.approx(0.3) for module in student.modules())
