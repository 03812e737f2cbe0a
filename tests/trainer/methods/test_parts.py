"""Parts of a batch and ranks add up to the whole batch, for every method that is defined sample by sample."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shards import Batch, TrainingReader
from trainer.methods import METHODS, Method
from trainer.methods.fast_advprop import FastAdvProp
from trainer.methods.method import total
from trainer.run import open_reader
from trainer.step import Learner, split_batch

from ..conftest import SIDE
from .conftest import batch_of, learner_of, settings, step_of, student_of, totals_of

PER_SAMPLE = [kind() for kind in METHODS if kind is not FastAdvProp]  # which cuts each part it is given in two


def losses_of(method: Method, batches: Iterable[Batch], totals: dict[str, int]) -> tuple[dict[str, float], Learner]:
    """Each term and the loss, summed over batches, and the student with the gradient of the sum.

    The student has no batch norm, whose statistics would be those of a part. Attacks begin at the image itself: random
    starts are drawn for a part as a whole.
    """
    learner, _ = learner_of(student_of("test_vit", SIDE), SIDE)
    sums: dict[str, float] = {}
    for batch in batches:
        terms = method.terms(step_of(learner, batch, settings(method), random_start=0.0))
        loss = total(terms, totals)
        loss.backward()
        for name, value in {"loss": loss, **{name: term.mean(totals) for name, term in terms.items()}}.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    return sums, learner


def assert_same(one: tuple[dict[str, float], Learner], other: tuple[dict[str, float], Learner]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-4)
    for left, right in zip(one[1].student.parameters(), other[1].student.parameters(), strict=True):
        assert left.grad is not None and right.grad is not None
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-2, atol=1e-4)


def read(run: Path, method: Method, rank: int = 0, world: int = 1) -> tuple[Batch, TrainingReader]:
    reader = open_reader(replace(settings(method, f"shards={run}", "batch=8")))
    reader.rank, reader.world = rank, world
    return next(iter(reader.batches(0))), reader


@pytest.mark.parametrize("method", PER_SAMPLE, ids=lambda method: method.name)
def test_three_parts_and_two_ranks_add_up_to_the_batch(tiny_run: Path, method: Method) -> None:
    """8 clean and 5 or 6 DAD images: parts and slices of unequal size."""
    batch, reader = read(tiny_run, method)
    whole = losses_of(method, [batch], reader.sizes(0))
    assert_same(losses_of(method, split_batch(batch, 3), reader.sizes(0)), whole)
    slices = [read(tiny_run, method, rank, 2)[0] for rank in range(2)]
    assert sum(len(part["clean"].keys) for part in slices) == len(batch["clean"].keys)
    assert_same(losses_of(method, slices, reader.sizes(0)), whole)


def test_fast_advprop_cuts_every_part_alike() -> None:
    """A fifth of each part is attacked; over three parts every sample counts once, by the whole batch's size."""
    method, batch = FastAdvProp(), batch_of(("clean",), size=30)
    learner, _ = learner_of(student_of())
    terms = [method.terms(step_of(learner, part, settings(method))) for part in split_batch(batch, 3)]
    assert [(len(each["ce"].values), len(each["ce_adversarial"].values)) for each in terms] == [(8, 2)] * 3
    each = torch.cat([term.values for part in terms for term in part.values()])
    summed = sum(total(part, totals_of(batch)).item() for part in terms)
    assert len(each) == 30 and summed == pytest.approx(each.mean().item(), rel=1e-5)
