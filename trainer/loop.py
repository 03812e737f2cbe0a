"""The training loop: shards in, a student out. Stop it at any moment; the same command goes on exactly where it was."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import closing
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
from .metrics import Log, Meter, to_csv
from .optimizer import learning_rate
from .ranks import distributed
from .recipe import Recipe
from .run import Training, check_weights, images_a_step, mend_best, prepare, save
from .step import Losses, train_step
from .student import fixed_size

LOG_EVERY = 20  # steps
ASK_EVERY = 5  # steps: a few seconds, where a cluster gives half a minute between the signal to stop and the end
T = TypeVar("T")


def train(recipe: Recipe, out: str) -> StudentDir:
    """Train a student to the end and return its directory.

    Raises UserError for an unknown student, shards that are missing or damaged, or a directory that holds another run.
    """
    with must_fit("the student does not fit into memory; free some, or choose a smaller one"):
        run = prepare(recipe, out)
        mend_best(run)
    quiet = not distributed.is_first()
    if run.at.epoch < recipe.epochs:
        if not quiet:
            click.echo(_opening(run))
        log = Log(run.directory.path, recipe, run.now)
        with (
            closing(log),
            memory_errors(),
            progress(
                run.total, f"{recipe.student} {recipe.loss.objective}", "step", initial=run.now, hidden=quiet
            ) as bar,
        ):
            while run.at.epoch < recipe.epochs:
                train_epoch(run, log, bar)
                end_epoch(run, log)
    if not quiet:
        click.echo(_closing(run))
    return run.directory


def train_epoch(run: Training, log: Log, bar: Any) -> None:
    """From where the run is to the end of its epoch, with checkpoints on the way.

    Told to stop, it writes one more and raises KeyboardInterrupt.
    """
    recipe, reader, at, meter = run.recipe, run.reader, run.at, Meter()
    augment, pin = Augment(recipe.augmentation, run.side), run.device.type == "cuda"
    saved = clock = time.monotonic()
    run.student.train()
    with told_to_stop(quiet=not distributed.is_first()) as stop:
        for batch, waited in with_waits(
            reader.batches(at.epoch, at.step, workers=recipe.workers, transform=augment, pin=pin)
        ):
            step = run.now
            rate, losses = advance(run, batch)
            meter.add(step, losses, batch)
            at.waited += waited
            last, logs = at.step == reader.steps, step % LOG_EVERY == 0
            due, leave = time.monotonic() - saved > 60 * recipe.checkpoint_minutes, stop.asked
            if distributed.world() > 1:  # all ranks must see alike, and asking costs time
                asks = last or step % ASK_EVERY == 0
                due, leave = asks and distributed.agree(due), asks and distributed.any_rank(leave)
            due = due or last or leave
            if due or logs:
                _record(at, meter, log, bar)
                if logs:
                    log.write({"lr": rate}, step)
                now = time.monotonic()
                at.seconds, clock = at.seconds + now - clock, now
            if due:
                check_weights(run)
                save(run)
                log.flush()  # what is on disk ends where the checkpoint does
                saved = time.monotonic()
            bar.update()
            if leave:
                break
        # Also what was asked while the epoch's last checkpoint was written. Nobody leaves before rank 0 has written it: those who
        # do end the job, and rank 0 with it.
        if distributed.any_rank(stop.asked):
            raise KeyboardInterrupt


def advance(run: Training, batch: Batch) -> tuple[float, Losses]:
    """One step of training: its learning rate, and the losses, still on the device."""
    recipe, reader, at, step = run.recipe, run.reader, run.at, run.now
    settings, sizes = recipe.optimizer, reader.sizes(at.step)
    rate = learning_rate(step, peak=settings.lr, warmup=round(settings.warmup * reader.steps), total=run.total)
    losses = train_step(
        run.forward, run.optimizer, batch, recipe, totals=sizes, rate=rate, step=step, device=run.device, bf16=run.bf16
    )
    if run.average is not None:
        run.average.update(run.student, step=step)
    at.step += 1
    at.images += sum(sizes.values())
    return rate, losses


def end_epoch(run: Training, log: Log) -> None:
    """Validate, keep the best weights, write the epoch's row, save."""
    at, recipe = run.at, run.recipe
    row: dict[str, float] = {"epoch": at.epoch} | {name: total / run.reader.steps for name, total in at.sums.items()}
    better = True
    if recipe.validation is not None:
        distributed.share_buffers(run.result)
        started = time.monotonic()
        score = score_set(
            run.result,
            image_set(recipe.validation, run.reader.classes),
            run.side,
            run.device,
            bf16=run.bf16,
            threads=recipe.workers,
            batch=max(
                1, min(BATCH, recipe.batch // recipe.accumulate // distributed.world())
            ),  # no more than a training step holds
        )
        at.validated += time.monotonic() - started
        row["val_top1"] = score.top1
        better = score.top1 >= at.best
        at.best = max(at.best, score.top1)
        log.write(
            {"val_top1": score.top1}, run.now - 1
        )  # with the epoch's last step: what comes from run.now on, the next start drops
    if better and distributed.is_first():
        run.directory.save_best(run.result)
    at.rows.append(row | {"images": at.images, "seconds": at.seconds})
    at.epoch, at.step, at.sums = at.epoch + 1, 0, {}
    if distributed.is_first():
        run.directory.store.write(METRICS, to_csv(at.rows).encode())
    save(run)
    log.flush()


def with_waits(items: Iterable[T]) -> Iterator[tuple[T, float]]:
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
    missing = run.reader.info.missing or {}
    left_out = (
        f"\n{run.directory}: note: {recipe.shards} was sealed without {len(missing)} of its shards" if missing else ""
    )
    return (
        f"{run.directory}: {recipe.student} {recipe.loss.objective}, {recipe.epochs} epochs of {run.reader.steps} steps, "
        f"{'bf16' if run.bf16 else 'fp32'} on {run.device}{going_on}\n"
        f"{run.directory}: {images_a_step(run.reader)} images a step, {_times_plain(run):.2f} times those of plain training{left_out}"
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
