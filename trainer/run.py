"""Prepare a run of training from its recipe, save it, and resume it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm.layers
import timm.utils
import torch
from torch import nn

from manifests import UserError
from manifests.devices import usable_cores, use_bf16
from manifests.notes import note
from shards import TrainingReader

from .checkpoint import BEST, LAST, Progress, StudentDir, describe
from .evaluation.sets import check_set
from .methods.method import Passes, passes_of
from .methods.parts.frozen import check_side, load_frozen
from .methods.parts.norms import add_norms
from .metrics import check_wandb
from .optimizer import create_optimizer
from .ranks import distributed
from .recipe import Recipe
from .step import Learner
from .student import Student, create_student, to_device, try_out


@dataclass
class Training:
    """Everything that one run of training works with, and its progress."""

    recipe: Recipe
    directory: StudentDir
    reader: TrainingReader
    side: int  # side of the student's input in pixels
    student: Student  # holds the weights
    learner: Learner
    average: Any  # timm's ModelEmaV3 of the student; None without an average
    at: Progress

    @property
    def device(self) -> torch.device:
        """The device of the student."""
        return self.learner.device

    @property
    def bf16(self) -> bool:
        """Whether forward and backward passes compute in bf16."""
        return self.learner.bf16

    @property
    def all_steps(self) -> int:
        """Steps of the whole training."""
        return self.recipe.epochs * self.reader.steps

    @property
    def steps_done(self) -> int:
        """Steps since training began, over all epochs; also the number of the next step."""
        return self.at.epoch * self.reader.steps + self.at.step

    @property
    def final_student(self) -> Student:
        """The student to evaluate and export: the moving average if the recipe asks for one."""
        student: Student = self.student if self.average is None else self.average.module
        return student

    @property
    def passes(self) -> Passes:
        """Passes per clean image, given the number of DAD images in these shards."""
        samples = self.reader.samples
        return passes_of(self.recipe.method, samples.get("dad", 0) / samples["clean"])


def prepare(recipe: Recipe, out: str) -> Training:
    """Load and check everything, and restore the last checkpoint. ``out``: the student's directory.

    Raises UserError for a recipe, shards, images or a directory that cannot be used.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    device = distributed.start(recipe.device)
    if recipe.sync_bn and distributed.world() > 1 and device.type != "cuda":
        raise UserError(f"sync_bn: works on GPUs only, this is {device}; set sync_bn=false")
    reader = open_reader(recipe)
    missing = reader.info.missing or {}
    left_out = [f"{recipe.shards}: was sealed without {len(missing)} of its shards"] if missing else []
    for text in [*reader.notes(), *left_out] if distributed.is_first() else ():
        note(text)
    _check(recipe, reader)
    torch.backends.cudnn.benchmark = True  # pays off because batches have only two or three sizes
    info = reader.info
    side = recipe.input or reader.canvas
    torch.manual_seed(recipe.seed)
    method = recipe.method
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
    add_norms(student, method.needs.norms)
    student = to_device(student, device)
    bf16 = use_bf16(recipe.precision, device)
    try_out(student, min(2, _smallest_part(recipe, reader)), side, device, bf16=bf16)
    optimizer = create_optimizer(student.model, recipe.optimizer)
    frozen = load_frozen(info, method.needs.models, device, recipe.models)
    check_side(frozen, side, device)
    if recipe.validation is not None:
        try:
            check_set(recipe.validation, reader.classes)
        except UserError as error:
            raise UserError(f"validation: {error}; set another, or validation=null") from error
    directory = StudentDir(out)
    if distributed.is_first():
        directory.begin(describe(recipe, student, reader.classes, side, info.fingerprint))
    distributed.agree(True)  # other ranks wait here until rank 0 knows that the checkpoint is of this run
    if recipe.check_shards:
        reader.check()
    forward = distributed.replicate(student, device)
    learner = Learner(
        student=student,
        forward=torch.compile(forward, dynamic=False) if recipe.compile else forward,  # two or three batch sizes
        optimizer=optimizer,
        device=device,
        bf16=bf16,
        frozen=frozen,
    )
    run = Training(
        recipe=recipe,
        directory=directory,
        reader=reader,
        side=side,
        student=student,
        learner=learner,
        average=timm.utils.ModelEmaV3(student, decay=recipe.ema, use_warmup=True) if recipe.ema else None,
        at=Progress(),
    )
    resume(run)
    if len(set(distributed.gather((run.at.epoch, run.at.step)))) > 1:
        raise UserError(
            f"{out}: the processes find different checkpoints here; --out must be on a disk that all machines share"
        )
    return run


def open_reader(recipe: Recipe) -> TrainingReader:
    """A reader of the streams that the recipe's method needs."""
    needs = recipe.method.needs
    return TrainingReader(
        recipe.shards,
        batch_size=recipe.batch,
        streams=needs.streams,
        partners=needs.partners,
        copies=needs.copies,
        seed=recipe.seed,
        window=recipe.window,
        rank=distributed.rank(),
        world=distributed.world(),
        images=recipe.images,
        temperature=getattr(recipe.method, "temperature", needs.temperature),
        cache_gb=recipe.cache_gb,
        side=recipe.input,
    )


def check_weights(run: Training) -> None:
    """Raises UserError for weights that are not finite. Call it before saving: the next loss would show it too late."""
    if not torch.isfinite(nn.utils.get_total_norm(list(run.student.parameters()))):
        raise UserError(
            f"the weights are no longer finite at step {run.steps_done}; lower optimizer.lr, and run the command again"
        )


def save(run: Training) -> None:
    """Write a checkpoint, on rank 0. A run that resumes from it ends in the same bits on a CPU."""
    if not distributed.is_first():
        return
    state = {
        "student": run.student.state_dict(),
        "optimizer": run.learner.optimizer.state_dict(),
        "progress": vars(run.at).copy(),
    }
    if run.average is not None:
        state["average"] = run.average.module.state_dict()
    run.directory.save_last(state)


def resume(run: Training) -> None:
    """Restore the last checkpoint, if there is one. Raises UserError when it is of another student.

    The epoch begins again when shards were sealed anew: they hold other samples, in another order.
    """
    info, state = run.reader.info, run.directory.load_last()
    run.at.manifest = info.manifest_sha256
    if state is None:
        return
    try:
        run.student.load_state_dict(state["student"])
        run.learner.optimizer.load_state_dict(state["optimizer"])
        if run.average is not None:
            run.average.module.load_state_dict(state["average"])
        run.at = Progress(**state["progress"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{run.directory.store.where(LAST)}: not a checkpoint of this student; delete it to start again"
        ) from error
    if run.at.manifest != info.manifest_sha256:
        if distributed.is_first():
            what = "the epoch begins again" if run.at.step else "training goes on"
            note(f"{run.recipe.shards}: sealed anew since the last checkpoint; {what}, with the samples now there")
        run.at.step, run.at.sums, run.at.manifest = 0, {}, info.manifest_sha256


def mend_best(run: Training) -> None:
    """Replace best weights that are missing or damaged by those of the last checkpoint, once an epoch is finished."""
    if run.at.epoch == 0 or not distributed.is_first():
        return
    try:
        run.directory.best_weights()
    except UserError:
        where = run.directory.store.where(BEST)
        note(f"{where}: missing or damaged; the weights of the last checkpoint take its place")
        run.directory.save_best(run.final_student)
        run.at.best = -1.0  # so that the next epoch becomes the best, whatever it scores
        save(run)


def images_a_step(reader: TrainingReader) -> str:
    """Images per step in words, such as "64 clean + 37.9 dad"."""
    return " + ".join(f"{round(samples / reader.steps, 1):g} {stream}" for stream, samples in reader.samples.items())


def check_smallest_part(recipe: Recipe, reader: TrainingReader) -> None:
    """Raises UserError when a part of a batch holds fewer clean images than the method needs."""
    least, there = recipe.method.needs.smallest, _parts(recipe, reader)["clean"]
    if there < least:
        enough = least * distributed.world() * recipe.accumulate
        raise UserError(
            f"batch: {recipe.batch}: {recipe.method.name} needs {least} clean images at a time, and gets {there}; "
            f"set it to {enough} or more, or lower accumulate"
        )


def _smallest_part(recipe: Recipe, reader: TrainingReader) -> int:
    """Fewest images in one forward pass of the student."""
    parts = _parts(recipe, reader).values()
    return max(1, min(parts) if recipe.forward == "separate" else sum(parts))


def _parts(recipe: Recipe, reader: TrainingReader) -> dict[str, int]:
    """Fewest images of each stream in one part of a batch on one rank."""
    parts = distributed.world() * recipe.accumulate
    return {stream: samples // reader.steps // parts for stream, samples in reader.samples.items()}


def _check(recipe: Recipe, reader: TrainingReader) -> None:
    """Raises UserError for a recipe that does not fit its shards or this machine."""
    check_wandb(recipe)
    if recipe.workers > usable_cores() and distributed.is_first():
        cores = usable_cores()
        note(f"workers: {recipe.workers} loader processes on {cores} cores; workers={cores} takes less memory")
    for dataset in reader.datasets.values():
        dataset.pixels(0, dataset.read(0))  # fail now if shards hold labels only, or an image cannot be read
    if reader.views > 1 and (recipe.augmentation.flip or recipe.augmentation.crop < 1):
        raise UserError(
            f"augmentation: the shards hold {reader.views} views of an image, each with a soft label of its own; "
            "set augmentation.flip=0 and augmentation.crop=1, so that the student sees what the teacher saw"
        )
    check_smallest_part(recipe, reader)
    if recipe.accumulate > min(reader.samples.values()) // reader.steps // distributed.world():
        raise UserError(
            f"accumulate: {recipe.accumulate} parts of a batch of {images_a_step(reader)} leave some empty; "
            "lower it, or raise batch"
        )
