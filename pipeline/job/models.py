"""The two frozen models of stage 1 on their device, in the run's precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from manifests import RunDir, UserError
from manifests.devices import choose_device, must_fit, repeatable, use_bf16
from manifests.notes import note
from manifests.rundir import RUN
from shards.sources.classes import ClassList

from ..method.discretizer import build_discretizer
from ..method.teacher import TeacherModel, load_teacher, weights_fingerprint
from ..recipe import Recipe


@dataclass(frozen=True)
class Models:
    """Teacher and discretizer, callable on images [B, 3, H, W] in [0, 1] on `device`."""

    teacher_model: TeacherModel
    discretizer_model: nn.Module
    device: torch.device
    bf16: bool
    compiled: tuple[Callable[..., Any], Callable[..., Any]] | None = None  # teacher, discretizer after torch.compile
    batch: int = 0  # batch size that compiled models always see; 0: the size of the call

    def teacher(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, classes] float32."""
        with self._precision():
            if self.compiled is None:
                logits: torch.Tensor = self.teacher_model(_channels_last(images))
                return logits
            return self.compiled[0](_channels_last(self._fill(images)))[: len(images)]

    def discretizer(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Q: (discretized images float32 in [0, 1], codes [B, h, w])."""
        with self._precision():
            run = self.compiled[1] if self.compiled else self.discretizer_model
            discrete, codes = run(_channels_last(self._fill(images)))
            return discrete[: len(images)].float(), codes[: len(images)]

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a CPU tensor to the models' device, without waiting for the copy."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def fetch(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
        """Copy a tensor to the CPU: (the copy, a function that waits until it is complete)."""
        if self.device.type != "cuda":
            return tensor.cpu(), lambda: None
        target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        target.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event(blocking=True)  # blocking: threads that wait for it sleep
        event.record(torch.cuda.current_stream(self.device))
        return target, event.synchronize

    def _fill(self, images: torch.Tensor) -> torch.Tensor:
        """Fill up a short batch: another size would compile other kernels, and change the bits of later batches."""
        if self.compiled is None or len(images) >= self.batch:
            return images
        return torch.cat([images, images[-1:].expand(self.batch - len(images), -1, -1, -1)])

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def load_models(recipe: Recipe, classes: ClassList) -> Models:
    """Load both models onto the recipe's device. Raises UserError naming the recipe field that is wrong."""
    if recipe.views.topk is not None and recipe.views.topk >= len(classes.names):
        raise UserError(f"views.topk: {recipe.views.topk} of {len(classes.names)} classes; choose fewer than there are")
    device = choose_device(recipe.device)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    with must_fit(f"device: {device}: the models do not fit its memory; free some, or choose another device"):
        teacher, discretizer = load_teacher(recipe.teacher, classes, device), build_discretizer(recipe.discretizer)
        return models_on_device(teacher, discretizer, recipe, device)


def resolve_precision(recipe: Recipe, out: RunDir, device: str | None) -> Recipe:
    """Replace ``precision: auto`` by bf16 or fp32: the format of the run already in ``out``, or the device's.

    device: name of the device that will do the work; None when it is elsewhere. Raises UserError when nothing says what
    that device can do, or when it is not there.
    """
    if recipe.precision != "auto":
        return recipe
    if out.store.exists(RUN):
        return replace(recipe, precision=out.info().recipe["precision"])
    if device is None:
        raise UserError("precision: auto depends on the device, and the workers run elsewhere; set it to bf16 or fp32")
    return replace(recipe, precision="bf16" if use_bf16("auto", choose_device(device)) else "fp32")


def fingerprints(recipe: Recipe, classes: ClassList, models: Models | None = None) -> dict[str, str]:
    """Fingerprints of both models' weights. models: None to read them from files, without embedding the class names."""
    teacher = models.teacher_model if models else load_teacher(recipe.teacher, classes, with_head=False)
    discretizer = models.discretizer_model if models else build_discretizer(recipe.discretizer)
    return {"teacher": weights_fingerprint(teacher), "discretizer": weights_fingerprint(discretizer)}


def models_on_device(teacher: TeacherModel, discretizer: nn.Module, recipe: Recipe, device: torch.device) -> Models:
    """Move both models to the device, as the recipe asks. Raises UserError for a canvas or codes that do not fit."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # pinned memory and events belong to the current device
        repeatable()
    if recipe.precision == "bf16" and not use_bf16("auto", device):
        note(f"precision: {device} has no bf16 in hardware; a run with --set precision=fp32 may be faster")
    settings = recipe.discretizer
    if settings.kind == "vqgan" and recipe.canvas % settings.config.downsampling:
        raise UserError(
            f"canvas: {recipe.canvas} is not a multiple of the VQGAN's {settings.config.downsampling} pixels per code"
        )
    if recipe.output.codes and settings.kind == "vqgan" and settings.config.n_embed > 65536:
        raise UserError(
            f"output.codes: {settings.config.n_embed} codes do not fit the uint16 of KEY.codes.npy; set it to false"
        )
    teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    discretizer.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    models = Models(teacher, discretizer, device, use_bf16(recipe.precision, device), batch=recipe.batch)
    return compile_models(models) if recipe.compile else models


def compile_models(models: Models) -> Models:
    """Compile both models: torch.compile fuses the element-wise work, of which a VQGAN has much."""
    if models.device.type == "cuda":
        models.teacher_model.requires_grad_(False)  # a compiled backward would compute the weights' gradients too
    return replace(models, compiled=(torch.compile(models.teacher_model), torch.compile(models.discretizer_model)))


def _channels_last(images: torch.Tensor) -> torch.Tensor:
    return images.contiguous(memory_format=torch.channels_last)
