"""The training loop: shards in, a student out. Stop it at any moment; the same command goes on exactly where it was."""

from __future__ import annotations

import csv
import io
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import timm.optim
import timm.utils
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from manifests import UserError
from manifests.devices import choose_device, use_bf16
from manifests.progress import progress
from manifests.recipe import nearest
from shards import Batch, TrainingReader
from shards.codec import to_float

from .augmentation import Augment
from .checkpoint import BEST, LAST, METRICS, StudentDir, describe
from .evaluate import check_set, score_set
from .objectives import STREAMS, student_loss
from .recipe import Optimizer, Recipe
from .schedule import learning_rate
from .student import create_student

LOG_EVERY = 20  # steps
FUSED = ("adam", "adamw", "sgd")  # of torch, in one pass over the weights: AdamW is 3.5x faster on CPU


@dataclass
class Progress:
    """Where training is, and what it has measured so far; part of every checkpoint."""

    epoch: int = 0
    step: int = 0  # global batches consumed in this epoch
    best: float = -1.0
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch
    rows: list[dict[str, float]] = field(default_factory=list)  # metrics.csv


def train(recipe: Recipe, out: str) -> StudentDir:
    """Train a student to the end and return its directory.

    Raises UserError for an unknown student, shards that are missing or damaged, or a directory that holds another run.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    device = choose_device(recipe.device)
    bf16 = use_bf16(recipe.precision, device)
    reader = TrainingReader(
        recipe.shards, batch_size=recipe.batch, streams=STREAMS[recipe.loss.objective], seed=recipe.seed, window=recipe.window
    )
    run_info = next(iter(reader.datasets.values())).info
    side = int(run_info.recipe["canvas"])
    torch.manual_seed(recipe.seed)
    student = create_student(recipe.student, len(reader.classes), side).to(device).to(memory_format=torch.channels_last)
    settings = recipe.optimizer
    optimizer = create_optimizer(student, settings)
    if recipe.validation is not None:
        check_set(Path(recipe.validation), reader.classes)
    directory = StudentDir(out)
    directory.claim(describe(recipe, student, reader.classes, side, run_info.fingerprint))
    if recipe.check_shards:
        reader.check()
    average = timm.utils.ModelEmaV3(student, decay=recipe.ema, use_warmup=True) if recipe.ema else None
    at = _resume(directory, student, optimizer, average)
    total = recipe.epochs * reader.steps
    if at.epoch < recipe.epochs:
        done = at.epoch * reader.steps + at.step
        label = f"{recipe.student} {recipe.loss.objective}"
        going_on = f", going on at step {done}" if done else ""
        numbers = "bf16" if bf16 else "fp32"
        click.echo(f"{out}: {label}, {recipe.epochs} epochs of {reader.steps} steps, {numbers} on {device}{going_on}")
        log = SummaryWriter(str(directory.path / "tensorboard"), purge_step=done)
        augment = Augment(recipe.augmentation)
        saved = time.monotonic()
        with progress(total, label, "step", initial=done) as bar:
            while at.epoch < recipe.epochs:
                started = time.monotonic()
                for batch in reader.batches(at.epoch, at.step, workers=recipe.workers, transform=augment):
                    now = at.epoch * reader.steps + at.step
                    rate = learning_rate(now, peak=settings.lr, warmup=round(settings.warmup * reader.steps), total=total)
                    losses = train_step(student, optimizer, batch, recipe, rate, device, bf16=bf16, step=now)
                    if average is not None:
                        average.update(student, step=now)
                    at.step += 1
                    for name, value in losses.items():
                        at.sums[name] = at.sums.get(name, 0.0) + value
                    if now % LOG_EVERY == 0:
                        log.add_scalar("lr", rate, now)
                        for name, value in losses.items():
                            log.add_scalar(name, value, now)
                        bar.set_postfix_str(f"loss {losses['loss']:.3f}", refresh=False)
                    bar.update()
                    if time.monotonic() - saved > 60 * recipe.checkpoint_minutes and at.step < reader.steps:
                        _save(directory, student, optimizer, average, at)
                        saved = time.monotonic()
                _end_of_epoch(
                    at, directory, average.module if average else student, reader, recipe, device, bf16, log, time.monotonic() - started
                )
                _save(directory, student, optimizer, average, at)
                saved = time.monotonic()
        log.close()
    click.echo(f"{out}: done" + (f", best val top-1 {at.best:.1f} %" if at.best >= 0 else ""))
    best = directory.path / BEST
    click.echo(f'load it: timm.create_model("{recipe.student}", num_classes={len(reader.classes)}, checkpoint_path="{best}")')
    return directory


def create_optimizer(student: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """timm's optimizer of that name. Raises UserError for a name that timm does not know."""
    if settings.name.lower() not in timm.optim.list_optimizers():
        raise UserError(f"optimizer.name: timm knows no optimizer {settings.name!r}{nearest(settings.name, timm.optim.list_optimizers())}")
    fused = {"fused": True} if settings.name.lower() in FUSED else {}
    optimizer: torch.optim.Optimizer = timm.optim.create_optimizer_v2(
        student, opt=settings.name, lr=settings.lr, weight_decay=settings.weight_decay, momentum=settings.momentum, **fused
    )
    return optimizer


def train_step(
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    recipe: Recipe,
    rate: float,
    device: torch.device,
    *,
    bf16: bool,
    step: int,
) -> dict[str, float]:
    """One update of the student; returns the loss and its terms. Raises UserError, naming the batch, when the loss is not finite."""
    student.train()
    torch.manual_seed(recipe.seed * 1_000_003 + step)  # dropout and the like; no generator state to save
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    halves = list(batch.values())
    images = to_float(torch.cat([half.images for half in halves]).to(device))
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        outputs = student(images).float().split([len(half.images) for half in halves])  # one joint forward for clean and DAD
    clean = halves[0]
    settings = recipe.loss
    loss, terms = student_loss(
        settings.objective,
        clean.labels.to(device),
        outputs,
        [half.logits.to(device) for half in halves],
        temperature=settings.temperature,
        weight=settings.weight,
    )
    values = {"loss": loss.item()} | {name: term.item() for name, term in terms.items()}
    if not math.isfinite(values["loss"]):
        keys = ", ".join(key for half in halves for key in half.keys)
        raise UserError(f"the loss became {values['loss']} at step {step}; lower optimizer.lr, or look at the samples: {keys}")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if recipe.optimizer.clip is not None:
        nn.utils.clip_grad_norm_(student.parameters(), recipe.optimizer.clip)
    optimizer.step()
    return values


def _end_of_epoch(
    at: Progress, directory: StudentDir, model: nn.Module, reader: TrainingReader, recipe: Recipe, device: torch.device, bf16: bool,
    log: SummaryWriter, seconds: float,
) -> None:  # fmt: skip
    row: dict[str, float] = {"epoch": at.epoch} | {name: total / reader.steps for name, total in at.sums.items()}
    better = True
    if recipe.validation is not None:
        side = int(next(iter(reader.datasets.values())).info.recipe["canvas"])
        row["val_top1"] = score_set(model, Path(recipe.validation), len(reader.classes), side, device, bf16=bf16).top1
        better = row["val_top1"] >= at.best
        at.best = max(at.best, row["val_top1"])
        log.add_scalar("val_top1", row["val_top1"], (at.epoch + 1) * reader.steps)
    row["seconds"] = seconds
    if better:
        directory.save_best(model.model)  # type: ignore[arg-type]
    at.rows.append(row)
    at.epoch, at.step, at.sums = at.epoch + 1, 0, {}
    directory.store.write(METRICS, _csv(at.rows).encode())


def _csv(rows: list[dict[str, float]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in rows)
    return text.getvalue()


def _save(directory: StudentDir, student: nn.Module, optimizer: torch.optim.Optimizer, average: Any, at: Progress) -> None:
    state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "progress": vars(at).copy()}
    if average is not None:
        state["average"] = average.module.state_dict()
    directory.save_last(state)


def _resume(directory: StudentDir, student: nn.Module, optimizer: torch.optim.Optimizer, average: Any) -> Progress:
    state = directory.load_last()
    if state is None:
        return Progress()
    try:
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.module.load_state_dict(state["average"])
        return Progress(**state["progress"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{directory.store.where(LAST)}: not a checkpoint of this student; delete it to start again") from error
