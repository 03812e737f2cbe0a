"""The training loop: shards in, a student out. It may be stopped at any moment; the same command goes on from there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from manifests.devices import must_fit
from manifests.progress import progress
from manifests.signals import told_to_stop
from shards import Batch

from .checkpoint import BEST, METRICS, Progress, StudentDir
from .evaluation.score import BATCH, score_set
from .evaluation.sets import image_set
from .images.augmentation import Augment
from .memory import memory_errors
from .methods.method import Passes
from .metrics import Log, Meter, to_csv
from .optimizer import learning_rate
from .ranks import distributed
from .recipe import Recipe
from .run import Training, check_weights, images_a_step, mend_best, prepare, save
from .step import Losses, train_step
from .student import fixed_size

LOG_EVERY = 20  # steps
ASK_EVERY = 5  # steps; a few seconds, of the half minute that a cluster grants after its signal to stop
T = TypeVar("T")


def _nothing(*_: Any) -> None:
    """The default of every hook."""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Functions that training calls on every rank; by default they do nothing. An exception in one ends training.

    `Training.steps_done` says where the run is.
    """

    before_training: Callable[[Training], None] = _nothing
    """Everything is loaded and checked, and the last checkpoint is restored."""
    before_step: Callable[[Training, Batch], None] = _nothing
    """The batch is read; the student has not learned from it yet."""
    after_step: Callable[[Training, Losses], None] = _nothing
    """The student's weights are updated. Reading the losses waits for the device."""
    before_save: Callable[[Training], None] = _nothing
    """Rank 0 is about to write a checkpoint."""
    before_validation: Callable[[Training], None] = _nothing
    """All steps of the epoch are done and saved. Validation follows if the recipe names a set."""
    after_epoch: Callable[[Training], None] = _nothing
    """The epoch is validated and saved; `Progress.epoch` is already the next epoch's number."""


def train(recipe: Recipe, out: str, hooks: Hooks = Hooks()) -> StudentDir:
    """Train a student to the end and return its directory.

    hooks: to watch a run, or to end it at a given step.
    Raises UserError for an unknown student, shards that are missing or damaged, or a directory that holds another run.
    """
    with must_fit("the student does not fit into memory; free some, or choose a smaller one"):
        run = prepare(recipe, out)
        mend_best(run)
    quiet = not distributed.is_first()
    if run.at.epoch < recipe.epochs:
        hooks.before_training(run)
        if not quiet:
            click.echo(_opening(run))
        log = Log(run.directory.path, recipe, run.steps_done)
        with (
            closing(log),
            memory_errors(),
            progress(
                run.all_steps, f"{recipe.student} {recipe.method.name}", "step", initial=run.steps_done, hidden=quiet
            ) as bar,
        ):
            while run.at.epoch < recipe.epochs:
                train_epoch(run, log, bar, hooks)
                hooks.before_validation(run)
                end_epoch(run, log, hooks)
                hooks.after_epoch(run)
    if not quiet:
        click.echo(_closing(run))
    return run.directory


def train_epoch(run: Training, log: Log, bar: Any, hooks: Hooks) -> None:
    """Train to the end of the current epoch, and write checkpoints on the way.

    Raises KeyboardInterrupt, after one more checkpoint, when the process receives a signal to stop.
    """
    recipe, reader, at, meter = run.recipe, run.reader, run.at, Meter()
    augment, pin = Augment(recipe.augmentation, run.side), run.device.type == "cuda"
    saved = clock = time.monotonic()
    run.student.train()
    with told_to_stop(quiet=not distributed.is_first()) as stop:
        batches = reader.batches(at.epoch, at.step, workers=recipe.workers, transform=augment, pin=pin)
        for batch, waited in with_waits(batches):
            hooks.before_step(run, batch)
            step = run.steps_done
            rate, losses = advance(run, batch)
            hooks.after_step(run, losses)
            meter.add(step, losses, batch)
            at.waited += waited
            pace = _pace(run, step, stop.asked, time.monotonic() - saved)
            if pace.read:
                _record(at, meter, log, bar)
                if pace.log:
                    log.write({"lr": rate}, step)
                now = time.monotonic()
                at.seconds, clock = at.seconds + now - clock, now
            if pace.save:
                check_weights(run)
                hooks.before_save(run)
                save(run)
                log.flush()  # so that the log on disk ends at the same step as the checkpoint
                saved = time.monotonic()
            bar.update()
            if pace.leave:
                break
        # A stop may arrive while the last checkpoint is being written. All ranks wait here: one that exits early
        # ends the job, and rank 0's write with it. A stop that came meanwhile counts in the vote that follows.
        distributed.agree(True)
        if distributed.any_rank(stop.asked):
            raise KeyboardInterrupt
    if stop.asked:  # since the vote
        raise KeyboardInterrupt


@dataclass(frozen=True)
class Pace:
    """What to do after a step, the same on all ranks."""

    log: bool  # write this step's losses to the log
    save: bool  # write a checkpoint
    leave: bool  # stop training here

    @property
    def read(self) -> bool:
        """Whether to read the losses, which waits for the device. Saving comes after reading: losses may be nan."""
        return self.log or self.save


def _pace(run: Training, step: int, asked: bool, unsaved: float) -> Pace:
    """asked: whether this process received a signal to stop. unsaved: seconds since the last checkpoint."""
    last = run.at.step == run.reader.steps
    due, leave = unsaved > 60 * run.recipe.checkpoint_minutes, asked
    if distributed.world() > 1:  # ranks must agree, and asking costs time
        asks = last or step % ASK_EVERY == 0
        due, leave = asks and distributed.agree(due), asks and distributed.any_rank(leave)
    return Pace(log=step % LOG_EVERY == 0, save=due or last or leave, leave=leave)


def advance(run: Training, batch: Batch) -> tuple[float, Losses]:
    """Take one training step. Returns its learning rate, and its losses, still on the device."""
    recipe, reader, at, step = run.recipe, run.reader, run.at, run.steps_done
    settings, sizes = recipe.optimizer, reader.sizes(at.step)
    rate = learning_rate(step, peak=settings.lr, warmup=round(settings.warmup * reader.steps), total=run.all_steps)
    losses = train_step(run.learner, batch, recipe, totals=sizes, rate=rate, step=step)
    if run.average is not None:
        run.average.update(run.student, step=step)
    at.step += 1
    at.images += sum(sizes.values())
    return rate, losses


def end_epoch(run: Training, log: Log, hooks: Hooks) -> None:
    """Validate, write the best weights, the epoch's row of metrics.csv and a checkpoint."""
    at, recipe = run.at, run.recipe
    row: dict[str, float] = {"epoch": at.epoch} | {name: total / run.reader.steps for name, total in at.sums.items()}
    better = True
    if recipe.validation is not None:
        distributed.share_buffers(run.final_student)
        started = time.monotonic()
        part = recipe.batch // recipe.accumulate // distributed.world()  # fits into memory: training steps hold it
        score = score_set(
            run.final_student,
            image_set(recipe.validation, run.reader.classes),
            run.side,
            run.device,
            bf16=run.bf16,
            threads=recipe.workers,
            batch=max(1, min(BATCH, part)),
        )
        at.validated += time.monotonic() - started
        row["val_top1"] = score.top1
        better = score.top1 >= at.best
        at.best = max(at.best, score.top1)
        # at the epoch's last step: points from run.steps_done on are purged when training resumes
        log.write({"val_top1": score.top1}, run.steps_done - 1)
    if better and distributed.is_first():
        run.directory.save_best(run.final_student)
    at.rows.append(row | {"images": at.images, "seconds": at.seconds})
    at.epoch, at.step, at.sums = at.epoch + 1, 0, {}
    if distributed.is_first():
        run.directory.store.write(METRICS, to_csv(at.rows).encode())
    hooks.before_save(run)
    save(run)
    log.flush()


def with_waits(items: Iterable[T]) -> Iterator[tuple[T, float]]:
    """Each item with the seconds of waiting for it."""
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
    recipe, directory = run.recipe, run.directory
    going_on = f", going on at step {run.steps_done}" if run.steps_done else ""
    return (
        f"{directory}: {recipe.student} {recipe.method.name}, {recipe.epochs} epochs of {run.reader.steps} steps, "
        f"{'bf16' if run.bf16 else 'fp32'} on {run.device}{going_on}\n"
        f"{directory}: {images_a_step(run.reader)} images a step, {cost_in_words(run.passes)}"
    )


def _closing(run: Training) -> str:
    at, recipe, directory = run.at, run.recipe, run.directory
    best = f", best val top-1 {at.best:.1f} %" if at.best >= 0 else ""
    speed = f"{at.images / at.seconds:.0f} images/s in {at.seconds / 60:.1f} minutes" if at.seconds else "no time"
    waited = f"{at.waited / max(at.seconds, 1e-9):.1%} of it waiting for data"
    validated = f", and {at.validated / 60:.1f} minutes of validation" if at.validated else ""
    model = f'timm.create_model("{recipe.student}", num_classes={len(run.reader.classes)}'
    size = f", img_size={run.side}" if fixed_size(recipe.student) else ""
    return (
        f"{directory}: done{best}\n"
        f"{directory}: what it cost: {at.images:,} images, {cost_in_words(run.passes)}; {speed}, {waited}{validated}\n"
        f'load it: {model}{size}, checkpoint_path="{directory.path / BEST}")'
    )


def cost_in_words(passes: Passes) -> str:
    """The cost of a method in words: the student's passes beside plain training's, and passes of other models."""
    others = [
        f"{count:g} of the {name}"
        for name, count in (("teacher", passes.teacher), ("discretizer", passes.discretizer))
        if count
    ]
    more = f" and, per clean image, {' and '.join(others)}" if others else ""
    return f"{passes.times_plain:.2f} times the passes of plain training{more}"
