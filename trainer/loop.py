"""The training loop: shards in, a student out. Stop it at any moment; the same command goes on exactly where it was."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import timm.layers
import timm.utils
import torch
from torch import nn

from manifests import UserError
from manifests.devices import use_bf16
from manifests.progress import progress
from shards import TrainingReader

from . import distributed
from .augmentation import Augment
from .checkpoint import BEST, LAST, METRICS, Progress, StudentDir, describe
from .evaluate import check_set, score_set
from .memory import memory_errors
from .metrics import Log, Meter, to_csv
from .objectives import STREAMS, Objective
from .optimizer import create_optimizer, learning_rate
from .recipe import Recipe
from .step import Forward, train_step
from .student import Student, create_student, fixed_size

LOG_EVERY = 20  # steps
T = TypeVar("T")


@dataclass
class Training:
    """What one run of training works with, and where it is."""

    recipe: Recipe
    directory: StudentDir
    reader: TrainingReader
    side: int  # of the student's input, in pixels
    device: torch.device
    bf16: bool
    student: Student  # holds the weights
    forward: Forward  # what is called: the student, compiled if so wished
    average: Any  # timm's ModelEmaV3 of the student, or None
    optimizer: torch.optim.Optimizer
    at: Progress

    @property
    def total(self) -> int:
        """Steps of the whole training."""
        return self.recipe.epochs * self.reader.steps

    @property
    def now(self) -> int:
        """Steps done."""
        return self.at.epoch * self.reader.steps + self.at.step

    @property
    def result(self) -> Student:
        """The student as it is evaluated and exported: averaged, if the recipe averages."""
        student: Student = self.student if self.average is None else self.average.module
        return student


def train(recipe: Recipe, out: str) -> StudentDir:
    """Train a student to the end and return its directory.

    Raises UserError for an unknown student, shards that are missing or damaged, or a directory that holds another run.
    """
    run = prepare(recipe, out)
    quiet = not distributed.is_first()
    if run.at.epoch < recipe.epochs:
        if not quiet:
            click.echo(_opening(run))
        log = Log(run.directory.path, recipe, run.now)
        with (
            closing(log),
            memory_errors(),
            progress(run.total, f"{recipe.student} {recipe.loss.objective}", "step", initial=run.now, hidden=quiet) as bar,
        ):
            while run.at.epoch < recipe.epochs:
                train_epoch(run, log, bar)
                end_epoch(run, log)
    if not quiet:
        click.echo(_closing(run))
    return run.directory


def prepare(recipe: Recipe, out: str) -> Training:
    """Load everything, check it, and go to where the last checkpoint was."""
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    device = distributed.start(recipe.device)
    if recipe.sync_bn and distributed.world() > 1 and device.type != "cuda":
        raise UserError(f"sync_bn: works on GPUs only, this is {device}; set sync_bn=false")
    reader = open_reader(recipe, recipe.loss.objective)
    if reader.views > 1 and (recipe.augmentation.flip or recipe.augmentation.crop < 1):
        raise UserError(
            f"augmentation: the shards hold {reader.views} views of an image, each with a soft label of its own; "
            "set augmentation.flip=0 and augmentation.crop=1, so that the student sees what the teacher saw"
        )
    if recipe.accumulate > min(reader.samples.values()) // reader.steps // distributed.world():
        raise UserError(
            f"accumulate: {recipe.accumulate} parts of a batch of {_images_a_step(reader)}; some would be empty: lower it, or raise batch"
        )
    torch.backends.cudnn.benchmark = True  # for batches of two or three sizes; CPUs do not look at it
    info = next(iter(reader.datasets.values())).info
    side = recipe.input or int(info.recipe["canvas"])
    torch.manual_seed(recipe.seed)
    student = create_student(
        recipe.student,
        len(reader.classes),
        side,
        pretrained=recipe.pretrained,
        drop_path=recipe.drop_path,
        dropout=recipe.dropout,
    )
    if recipe.sync_bn:
        student = timm.layers.convert_sync_batchnorm(student)
    student = student.to(device).to(memory_format=torch.channels_last)
    optimizer = create_optimizer(student.model, recipe.optimizer)
    if recipe.validation is not None:
        check_set(Path(recipe.validation), reader.classes)
    directory = StudentDir(out)
    if distributed.is_first():
        directory.claim(describe(recipe, student, reader.classes, side, info.fingerprint))
    distributed.agree(True)  # nobody reads a checkpoint before it is known to be of this run
    if recipe.check_shards:
        reader.check()
    forward = distributed.replicate(student, device)
    run = Training(
        recipe=recipe,
        directory=directory,
        reader=reader,
        side=side,
        device=device,
        bf16=use_bf16(recipe.precision, device),
        student=student,
        forward=torch.compile(forward, dynamic=False) if recipe.compile else forward,  # batches come in two or three sizes
        average=timm.utils.ModelEmaV3(student, decay=recipe.ema, use_warmup=True) if recipe.ema else None,
        optimizer=optimizer,
        at=Progress(),
    )
    resume(run)
    if len(set(distributed.gather((run.at.epoch, run.at.step)))) > 1:
        raise UserError(f"{out}: the processes find different checkpoints here; --out must be on a disk that all machines share")
    return run


def open_reader(recipe: Recipe, objective: Objective) -> TrainingReader:
    """The streams that an objective learns from, read as the recipe says."""
    return TrainingReader(
        recipe.shards,
        batch_size=recipe.batch,
        streams=STREAMS[objective],
        seed=recipe.seed,
        window=recipe.window,
        rank=distributed.rank(),
        world=distributed.world(),
        images=recipe.images,
        temperature=recipe.loss.temperature,
        cache_gb=recipe.cache_gb,
    )


def train_epoch(run: Training, log: Log, bar: Any) -> None:
    """From where the run is to the end of its epoch, with checkpoints on the way."""
    recipe, reader, at = run.recipe, run.reader, run.at
    settings, meter, on_gpu = recipe.optimizer, Meter(), run.device.type == "cuda"
    augment = Augment(recipe.augmentation, run.side)
    warmup = round(settings.warmup * reader.steps)
    saved = clock = time.monotonic()
    run.student.train()
    for batch, waited in timed(reader.batches(at.epoch, at.step, workers=recipe.workers, transform=augment, pin=on_gpu)):
        step, sizes = run.now, reader.sizes(at.step)
        rate = learning_rate(step, peak=settings.lr, warmup=warmup, total=run.total)
        losses = train_step(
            run.forward,
            run.optimizer,
            batch,
            recipe,
            totals=sizes,
            rate=rate,
            step=step,
            device=run.device,
            bf16=run.bf16,
        )
        if run.average is not None:
            run.average.update(run.student, step=step)
        meter.add(step, losses, batch)
        at.step += 1
        at.images += sum(sizes.values())
        at.waited += waited
        last, logs = at.step == reader.steps, step % LOG_EVERY == 0
        due = time.monotonic() - saved > 60 * recipe.checkpoint_minutes
        if distributed.world() > 1:  # whether a checkpoint is due, all ranks must see alike, and asking costs time
            due = logs and distributed.agree(due)
        due = due or last
        if due or logs:
            _record(at, meter, log, bar)
            if logs:
                log.write({"lr": rate}, step)
            now = time.monotonic()
            at.seconds, clock = at.seconds + now - clock, now
        if due:
            check_weights(run)
        if due and not last:
            save(run)
            log.flush()  # what is on disk ends where the checkpoint does
            saved = time.monotonic()
        bar.update()


def end_epoch(run: Training, log: Log) -> None:
    """Validate, keep the best weights, write the epoch's row, save."""
    at, recipe = run.at, run.recipe
    row: dict[str, float] = {"epoch": at.epoch} | {name: total / run.reader.steps for name, total in at.sums.items()}
    better = True
    if recipe.validation is not None:
        distributed.share_buffers(run.result)
        started, classes = time.monotonic(), len(run.reader.classes)
        score = score_set(run.result, Path(recipe.validation), classes, run.side, run.device, bf16=run.bf16, threads=recipe.workers)
        at.validated += time.monotonic() - started
        row["val_top1"] = score.top1
        better = score.top1 >= at.best
        at.best = max(at.best, score.top1)
        log.write({"val_top1": score.top1}, run.now)
    if better and distributed.is_first():
        run.directory.save_best(run.result)
    at.rows.append(row | {"images": at.images, "seconds": at.seconds})
    at.epoch, at.step, at.sums = at.epoch + 1, 0, {}
    if distributed.is_first():
        run.directory.store.write(METRICS, to_csv(at.rows).encode())
    save(run)
    log.flush()


def check_weights(run: Training) -> None:
    """Before anything is written. Raises UserError when an update has overflowed, which the next loss would show too late."""
    if not torch.isfinite(nn.utils.get_total_norm(list(run.student.parameters()))):
        raise UserError(f"the weights are no longer finite at step {run.now}; lower optimizer.lr, and run the command again")


def save(run: Training) -> None:
    """Write the checkpoint: everything that going on to the bit needs. Of several processes the first one writes."""
    if not distributed.is_first():
        return
    state = {"student": run.student.state_dict(), "optimizer": run.optimizer.state_dict(), "progress": vars(run.at).copy()}
    if run.average is not None:
        state["average"] = run.average.module.state_dict()
    run.directory.save_last(state)


def resume(run: Training) -> None:
    """Go to where the last checkpoint was, if there is one. Raises UserError when it is of another student."""
    state = run.directory.load_last()
    if state is None:
        return
    try:
        run.student.load_state_dict(state["student"])
        run.optimizer.load_state_dict(state["optimizer"])
        if run.average is not None:
            run.average.module.load_state_dict(state["average"])
        run.at = Progress(**state["progress"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{run.directory.store.where(LAST)}: not a checkpoint of this student; delete it to start again") from error


def timed(items: Iterable[T]) -> Iterator[tuple[T, float]]:
    """Each item with the seconds that it was waited for."""
    started = time.monotonic()
    for item in items:
        yield item, time.monotonic() - started
        started = time.monotonic()


def _record(at: Progress, meter: Meter, log: Log, bar: Any) -> None:
    for step, losses in meter.read():
        for name, value in losses.items():
            at.sums[name] = at.sums.get(name, 0.0) + value
        if step % LOG_EVERY == 0:
            log.write(losses, step)
            bar.set_postfix_str(f"loss {losses['loss']:.3f}", refresh=False)


def _opening(run: Training) -> str:
    recipe = run.recipe
    going_on = f", going on at step {run.now}" if run.now else ""
    return (
        f"{run.directory}: {recipe.student} {recipe.loss.objective}, {recipe.epochs} epochs of {run.reader.steps} steps, "
        f"{'bf16' if run.bf16 else 'fp32'} on {run.device}{going_on}\n"
        f"{run.directory}: {_images_a_step(run.reader)} images a step, {_times_plain(run):.2f} times those of plain training"
    )


def _closing(run: Training) -> str:
    at, recipe = run.at, run.recipe
    best = f", best val top-1 {at.best:.1f} %" if at.best >= 0 else ""
    cost = f"{at.images:,} images, {_times_plain(run):.2f} times those of plain training"
    speed = f"{at.images / at.seconds:.0f} images/s in {at.seconds / 60:.1f} minutes" if at.seconds else "no time"
    validated = f", and {at.validated / 60:.1f} minutes of validation" if at.validated else ""
    model = f'timm.create_model("{recipe.student}", num_classes={len(run.reader.classes)}'
    size = f", img_size={run.side}" if fixed_size(recipe.student) else ""
    return (
        f"{run.directory}: done{best}\n"
        f"{run.directory}: what it cost: {cost}; {speed}, {at.waited / max(at.seconds, 1e-9):.1%} of it waiting for data{validated}\n"
        f'load it: {model}{size}, checkpoint_path="{run.directory.path / BEST}")'
    )


def _times_plain(run: Training) -> float:
    return sum(run.reader.samples.values()) / run.reader.samples["clean"]


def _images_a_step(reader: TrainingReader) -> str:
    return " + ".join(f"{round(samples / reader.steps, 1):g} {stream}" for stream, samples in reader.samples.items())
