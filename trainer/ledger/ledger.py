"""The cost ledger (paper, table 7): what a clean image costs under every way of training, timed in turn with the same student and data."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from manifests import UserError
from manifests.devices import use_bf16
from manifests.progress import progress
from shards import Batch, seeded_generator
from shards.codec import to_float

from ..images.augmentation import Augment
from ..loop import with_waits
from ..memory import memory_errors
from ..methods.advprop import advprop_loss, fast_advprop_loss
from ..methods.at import adversarial_training_loss
from ..methods.attacks import Quantizer, Teacher
from ..methods.dat import dat_loss
from ..methods.live import live_dad_loss, live_kd_loss
from ..methods.losses import STREAMS, Objective
from ..methods.norms import with_auxiliary_norms
from ..optimizer import create_optimizer
from ..recipe import Recipe
from ..run import open_reader
from ..step import batch_loss, split_batch
from ..student import create_student, to_device

# Table 7 gives Fast AdvProp as 3: its three passes are those of AdvProp with one step. Decoupled, as published, it takes fewer.
PAPER = {"AT-10": 11.0, "AdvProp-5": 7.0, "AdvProp-1": 3.0, "DAT-1": 3.5, "DAD from shards": 2.0}
IGNORED = (
    "pretrained",
    "drop_path",
    "dropout",
    "ema",
    "compile",
    "sync_bn",
)  # fields of the recipe that are left out of all schemes alike
STUDENTS = (1, 2, 5, 10)  # that share one set of shards


@dataclass(frozen=True)
class Models:
    """The frozen models of stage 1, on the device."""

    teacher: Teacher
    discretizer: Quantizer
    generate: Callable[[torch.Tensor, torch.Tensor], None]  # all that stage 1 computes for clean images and labels


@dataclass(frozen=True)
class Scheme:
    """One line of the ledger."""

    name: str
    objective: Objective  # decides which streams are read
    loss: Callable[
        [Batch, Mapping[str, int]], torch.Tensor
    ]  # of a part of a batch with so many samples of each stream; parts add up


@dataclass(frozen=True)
class Timing:
    """One measurement of one scheme."""

    seconds: float  # per clean image, loading included
    waiting: float  # share of it spent waiting for data; an upper bound on a GPU, which computes meanwhile


def schemes(
    recipe: Recipe, student: nn.Module, auxiliary: nn.Module, models: Models, device: torch.device
) -> list[Scheme]:
    """Every line of the ledger, plain training first."""
    temperature, weight = recipe.loss.temperature, recipe.loss.weight
    mixing = seeded_generator("cost", recipe.seed)
    generator = torch.Generator(device).manual_seed(
        mixing.initial_seed()
    )  # noise is made where it is used, not copied there

    def stored(name: str, objective: Objective) -> Scheme:
        settings = replace(recipe, loss=replace(recipe.loss, objective=objective))
        return Scheme(
            name, objective, lambda part, totals: batch_loss(student, part, settings, totals, mixing, device)[0]
        )

    def live(name: str, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Scheme:
        def share(part: Batch, totals: Mapping[str, int]) -> torch.Tensor:
            x, y = images_of(part, "clean", device), part["clean"].labels.to(device, non_blocking=True)
            return loss(x, y) * (len(y) / totals["clean"])

        return Scheme(name, "plain", share)

    def live_dad(part: Batch, totals: Mapping[str, int]) -> torch.Tensor:
        clean, dad = (images_of(part, stream, device) for stream in ("clean", "dad"))
        y = part["clean"].labels.to(device, non_blocking=True)
        loss = live_dad_loss(student, models.teacher, clean, y, dad, temperature=temperature, weight=weight)
        return loss * (len(y) / totals["clean"])

    return [
        stored("plain", "plain"),
        stored("KD from shards", "kd"),
        stored("DAD from shards", "dad"),
        live(
            "KD, live teacher",
            lambda x, y: live_kd_loss(student, models.teacher, x, y, temperature=temperature, weight=weight),
        ),
        Scheme("DAD, live teacher", "dad", live_dad),
        live("AT-10", lambda x, y: adversarial_training_loss(student, x, y, generator)),
        live("AdvProp-5", lambda x, y: advprop_loss(student, auxiliary, x, y, generator)),
        live("AdvProp-1", lambda x, y: advprop_loss(student, auxiliary, x, y, generator, steps=1)),
        live("Fast AdvProp-1", lambda x, y: fast_advprop_loss(student, auxiliary, x, y, generator)),
        live("DAT-1", lambda x, y: dat_loss(student, models.discretizer, x, y, generator)),
    ]


def totals_of(batch: Batch) -> dict[str, int]:
    """Samples of each stream in a batch."""
    return {stream: len(half.keys) for stream, half in batch.items()}


def images_of(batch: Batch, stream: str, device: torch.device) -> torch.Tensor:
    """A half's images on the device, [B, 3, H, W] in [0, 1]."""
    return to_float(batch[stream].images.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)


def measure(
    recipe: Recipe, models: Models, device: torch.device, *, steps: int, repeats: int
) -> tuple[dict[str, list[Timing]], list[float]]:
    """Time all schemes in turn, ``repeats`` times over: their timings by name, and seconds per clean image of making the shards.

    Each measurement reads samples of its own epoch, and each turn begins with another scheme, so that none finds what another has
    brought into memory. Raises UserError when the shards hold too few batches for one measurement.
    """
    readers = {objective: open_reader(recipe, objective) for objective in STREAMS}
    dataset, batches = readers["dad"].datasets["clean"], readers["dad"].steps
    side = recipe.input or readers["dad"].canvas
    warmup = 1 + readers["plain"].read_ahead(
        recipe.workers
    )  # what the loader has read ahead must be used up, or it would seem free
    if recipe.batch // recipe.accumulate < 10:
        parts = f" in {recipe.accumulate} parts" if recipe.accumulate > 1 else ""
        raise UserError(
            f"batch: {recipe.batch}{parts}; Fast AdvProp's fifth would be a single image: set it to {10 * recipe.accumulate} or more"
        )
    if batches < warmup + steps:
        raise UserError(
            f"{recipe.shards}: {batches} batches, a measurement takes {warmup + steps}; lower batch or --steps"
        )
    torch.backends.cudnn.benchmark = True  # as in training
    torch.manual_seed(recipe.seed)
    student = to_device(create_student(recipe.student, len(dataset.classes), side), device).train()
    auxiliary = with_auxiliary_norms(student)
    optimizer = create_optimizer(nn.ModuleList([student, auxiliary]), recipe.optimizer)
    augment, bf16 = Augment(recipe.augmentation, side), use_bf16(recipe.precision, device)

    def update(scheme: Scheme, batch: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        for part in split_batch(batch, recipe.accumulate):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = scheme.loss(part, totals_of(batch))
            loss.backward()
        if recipe.optimizer.clip is not None:
            nn.utils.clip_grad_norm_(student.parameters(), recipe.optimizer.clip)
        optimizer.step()

    def generate(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            models.generate(images_of(batch, "clean", device), batch["clean"].labels.to(device))

    lines = schemes(recipe, student, auxiliary, models, device)
    timings: dict[str, list[Timing]] = {scheme.name: [] for scheme in lines}
    generation: list[float] = []
    with memory_errors(), progress(repeats * (len(lines) + 1), "measuring", "scheme") as bar:
        for turn in range(repeats):
            some = itertools.islice(readers["plain"].batches(turn), 3)
            generation.append(clock(some, generate, 1, device).seconds)  # first: if memory runs out, then here
            bar.update()
            for place in range(len(lines)):
                scheme, epoch = lines[(turn + place) % len(lines)], turn * len(lines) + place
                read = readers[scheme.objective].batches(
                    epoch, workers=recipe.workers, transform=augment, pin=device.type == "cuda"
                )
                some = itertools.islice(read, warmup + steps)
                timings[scheme.name].append(clock(some, partial(update, scheme), warmup, device))
                bar.update()
    return timings, generation


def whole_bursts(steps: int, workers: int) -> int:
    """At least ``steps``, in whole rounds of the loader's workers and two of them: each round, all deliver at about the same time."""
    rounds = max(2, -(-steps // max(workers, 1)))
    return steps if workers < 2 else rounds * workers


def clock(batches: Iterator[Batch], step: Callable[[Batch], None], warmup: int, device: torch.device) -> Timing:
    """Run all batches, the device idle before and after; time those after the first ``warmup``."""
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
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(timings: dict[str, list[Timing]], generation: list[float], epochs: int) -> str:
    """The ledger in Markdown. Ratios are to plain training of the same turn: their median [lowest, highest].

    generation: seconds per clean image of making the shards; it is spread over ``epochs`` and over the students that share the shards.
    """
    plain = [timing.seconds for timing in timings["plain"]]
    lines = ["| scheme | ms per clean image | x plain | paper | waiting for data |", "|---|---|---|---|---|"]
    cost: dict[str, float] = {}
    for name, measured in timings.items():
        ratios = [timing.seconds / base for timing, base in zip(measured, plain, strict=True)]
        cost[name] = statistics.median(ratios)
        per_image = 1000 * statistics.median(timing.seconds for timing in measured)
        waiting = statistics.median(timing.waiting for timing in measured)
        spread = f"{cost[name]:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        paper = f"{PAPER[name]:g}" if name in PAPER else ""
        lines.append(f"| {name} | {per_image:.2f} | {spread} | {paper} | {waiting:.1%} |")
    dad, live = cost["DAD from shards"], cost["DAD, live teacher"]
    making = statistics.median(made / base for made, base in zip(generation, plain, strict=True))
    once = f"{1000 * statistics.median(generation):.1f} ms per clean image, or {making:.2f} epochs of plain training"
    shared = ", ".join(f"{dad + making / epochs / students:.2f} with {students}" for students in STUDENTS)
    lines += [
        "",
        "The paper counts Fast AdvProp as 3: its three passes are those of AdvProp-1. As published it takes fewer.",
        f"DAD from shards: {dad:.2f} x plain (goal: 2.0), {dad / live:.2f} of the scheme with a live teacher.",
        f"Making the shards, once: {once}.",
        f"DAD with its share of that, over {epochs} epochs, by the number of students that use the shards: {shared}.",
    ]
    return "\n".join(lines)
