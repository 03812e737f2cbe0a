"""The ledger measures every method with the trainer's own step, the same student and the same data."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from manifests import UserError
from manifests.devices import use_bf16
from manifests.progress import progress
from shards import Batch
from shards.codec import to_float

from ..images.augmentation import Augment
from ..loop import with_waits
from ..memory import memory_errors
from ..methods import METHODS, Method
from ..methods.advprop import AdvProp
from ..methods.method import passes_of
from ..methods.parts.frozen import Frozen
from ..methods.parts.norms import add_norms
from ..optimizer import create_optimizer
from ..recipe import Recipe, with_shared_settings
from ..run import check_smallest_part, open_reader
from ..step import Learner, train_step
from ..student import create_student, to_device
from ..tables.methods import passes_in_words

IGNORED = ("pretrained", "drop_path", "dropout", "ema", "compile", "sync_bn")  # the ledger leaves these fields out
STUDENTS = (1, 2, 5, 10)  # numbers of students that share the cost of the shards


@dataclass(frozen=True)
class Models:
    """The models of stage 1, on the device."""

    frozen: Mapping[str, Frozen]  # models that methods use in every step
    generate: Callable[[torch.Tensor, torch.Tensor], None]  # the whole computation of stage 1, from images and labels


@dataclass(frozen=True)
class Line:
    """One line of the ledger."""

    name: str
    method: Method


@dataclass(frozen=True)
class Timing:
    """One measurement of one line."""

    seconds: float  # time per clean image, loading included
    waiting: float  # share of the time spent waiting for data; an upper bound on a GPU, which computes meanwhile


def ledger_lines(recipe: Recipe) -> list[Line]:
    """A line for every method, with its defaults and the recipe's temperature, weight and smoothing. Plain comes first.

    A line for AdvProp with one step follows AdvProp, because the paper counts Fast AdvProp as that.
    """
    methods = [with_shared_settings(method.name, recipe.method) for method in (kind() for kind in METHODS)]
    lines = [Line(method.name, method) for method in methods]
    place = next(number for number, line in enumerate(lines, 1) if isinstance(line.method, AdvProp))
    return [*lines[:place], Line("advprop, 1 step", AdvProp(steps=1)), *lines[place:]]


def images_of(batch: Batch, stream: str, device: torch.device) -> torch.Tensor:
    """A stream's images on the device, [B, 3, H, W] in [0, 1]."""
    return to_float(batch[stream].images.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)


def measure(
    recipe: Recipe, models: Models, device: torch.device, *, steps: int, repeats: int
) -> tuple[dict[str, list[Timing]], list[float]]:
    """Time all lines in turn, ``repeats`` times. Returns timings by name, and seconds per clean image of making shards.

    Every measurement reads an epoch of its own, and every turn begins with another line, so that no line profits from
    data that another left in memory. Raises UserError when the shards hold too few batches for one measurement.
    """
    lines = ledger_lines(recipe)
    recipes = {line.name: replace(recipe, method=line.method) for line in lines}
    readers = {line.name: open_reader(recipes[line.name]) for line in lines}
    plain = readers[lines[0].name]
    # use up the batches that the loader reads ahead, or their loading would seem free
    warmup = 1 + plain.read_ahead(recipe.workers)
    for name, reader in readers.items():
        check_smallest_part(recipes[name], reader)
    if plain.steps < warmup + steps:
        raise UserError(
            f"{recipe.shards}: {plain.steps} batches, a measurement takes {warmup + steps}; lower batch or --steps"
        )
    torch.backends.cudnn.benchmark = True  # as in training
    side, bf16 = recipe.input or plain.canvas, use_bf16(recipe.precision, device)
    learners = {
        sets: create_learner(recipe, len(plain.classes), side, sets, models, device, bf16=bf16)
        for sets in sorted({line.method.needs.norms for line in lines})
    }
    augment = Augment(recipe.augmentation, side)

    def update(line: Line, batch: Batch) -> None:
        totals = {stream: len(some.keys) for stream, some in batch.items()}
        learner = learners[line.method.needs.norms]
        train_step(learner, batch, recipes[line.name], totals=totals, rate=recipe.optimizer.lr, step=0)

    def generate(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            models.generate(images_of(batch, "clean", device), batch["clean"].labels.to(device))

    timings: dict[str, list[Timing]] = {line.name: [] for line in lines}
    generation: list[float] = []
    with memory_errors(), progress(repeats * (len(lines) + 1), "measuring", "method") as bar:
        for turn in range(repeats):
            some = itertools.islice(plain.batches(turn), 3)
            generation.append(clock(some, generate, 1, device).seconds)  # first, because it needs the most memory
            bar.update()
            for place in range(len(lines)):
                line, epoch = lines[(turn + place) % len(lines)], turn * len(lines) + place
                pin = device.type == "cuda"
                read = readers[line.name].batches(epoch, workers=recipe.workers, transform=augment, pin=pin)
                some = itertools.islice(read, warmup + steps)
                timings[line.name].append(clock(some, partial(update, line), warmup, device))
                bar.update()
    return timings, generation


def create_learner(
    recipe: Recipe, classes: int, side: int, norms: int, models: Models, device: torch.device, *, bf16: bool
) -> Learner:
    """A new student with ``norms`` sets of batch norms, and its optimizer. side: in pixels."""
    torch.manual_seed(recipe.seed)
    student = create_student(recipe.student, classes, side)
    add_norms(student, norms)
    to_device(student, device).train()
    optimizer = create_optimizer(student.model, recipe.optimizer)
    return Learner(student, student, optimizer, device, bf16, models.frozen)


def whole_bursts(steps: int, workers: int) -> int:
    """Round ``steps`` up to whole rounds of the loader's workers, and to two at least.

    All workers deliver at about the same time, so that a part of a round would measure too much or too little.
    """
    rounds = max(2, -(-steps // max(workers, 1)))
    return steps if workers < 2 else rounds * workers


def clock(batches: Iterator[Batch], step: Callable[[Batch], None], warmup: int, device: torch.device) -> Timing:
    """Run all batches, and time the ones after the first ``warmup``. The device is idle before and after."""
    started = waited = 0.0
    images = 0
    for number, (batch, waiting) in enumerate(with_waits(batches)):
        if number == warmup:
            wait_for(device)
            started = time.monotonic() - waiting
        if number >= warmup:
            waited, images = waited + waiting, images + len(batch["clean"].keys)
        step(batch)
    wait_for(device)
    total = time.monotonic() - started
    return Timing(total / images, waited / total)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(timings: Mapping[str, list[Timing]], generation: list[float], recipe: Recipe, verified: float) -> str:
    """The ledger in Markdown. Ratios compare with plain training in the same turn: median [lowest, highest].

    generation: seconds per clean image of making the shards, to be shared by the recipe's epochs and the students.
    verified: number of DAD images per clean one, for counting passes.
    """
    methods = {line.name: line.method for line in ledger_lines(recipe)}
    plain = [timing.seconds for timing in timings["plain"]]
    lines = [
        "| method | ms per clean image | x plain | passes per clean image | paper | waiting for data |",
        "|---|---|---|---|---|---|",
    ]
    cost: dict[str, float] = {}
    for name, measured in timings.items():
        ratios = [timing.seconds / base for timing, base in zip(measured, plain, strict=True)]
        cost[name] = statistics.median(ratios)
        per_image = 1000 * statistics.median(timing.seconds for timing in measured)
        waiting = statistics.median(timing.waiting for timing in measured)
        spread = f"{cost[name]:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        passes = passes_of(methods[name], verified)
        paper = "" if passes.paper is None else f"{passes.paper:g}"
        lines.append(f"| {name} | {per_image:.2f} | {spread} | {passes_in_words(passes)} | {paper} | {waiting:.1%} |")
    dad, live, epochs = cost["dad"], cost["dad_live"], recipe.epochs
    making = statistics.median(made / base for made, base in zip(generation, plain, strict=True))
    once = f"{1000 * statistics.median(generation):.1f} ms per clean image, or {making:.2f} epochs of plain training"
    shared = ", ".join(f"{dad + making / epochs / students:.2f} with {students}" for students in STUDENTS)
    lines += [
        "",
        "The paper counts an attack pass like a training pass, all DAD images as verified, "
        "and Fast AdvProp as AdvProp with one step.",
        f"DAD from shards: {dad:.2f} x plain (goal: 2.0), {dad / live:.2f} of DAD with a live teacher.",
        f"Making the shards, once: {once}.",
        f"DAD with its share of that, over {epochs} epochs, by the number of students that use the shards: {shared}.",
    ]
    return "\n".join(lines)
