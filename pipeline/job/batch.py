"""The method on one batch, in three stages that may overlap with those of other batches.

`attack_batch` runs the teacher on x and the attack, and starts the encoding of x''; `judge_batch` runs the teacher on
x'' as stored; `collect` waits for the verdicts. On a GPU nothing waits before `collect`: while the GPU attacks one
batch, the CPU encodes the batch before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from shards import ImageFormat, decode_image, encode_image
from shards.codec import to_float, to_uint8
from shards.views import view_images

from ..method.attack import Attacked, attack, verified
from ..recipe import Recipe
from .models import Models
from .prepare import Prepared

Row = dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """x'' after the image codec."""

    data: bytes
    pixels: torch.Tensor  # as a reader will decode them, uint8 [3, S, S]
    views: torch.Tensor | None  # views of `pixels`, uint8 [V, 3, S, S]


@dataclass(frozen=True)
class AttackedBatch:
    """B usable samples, attacked; threads are encoding their x''."""

    y: torch.Tensor  # [B]
    clean_logits: torch.Tensor  # [B, classes]
    clean_soft_labels: torch.Tensor  # [B, classes] or [B, V, classes]
    attacked: Attacked
    attacked_loss: torch.Tensor | None  # [B]
    stored: list[Future[Stored]]


@dataclass(frozen=True)
class JudgedBatch:
    """Verdicts on B samples; their copies from the device may be under way."""

    columns: dict[str, torch.Tensor]  # [B] each, complete on the CPU once `ready` returns
    clean_soft_labels: torch.Tensor  # float16 [B, classes] or [B, V, classes]
    dad_soft_labels: torch.Tensor
    codes: torch.Tensor  # [B, h, w]
    images: list[bytes]
    ready: Callable[[], None]


@dataclass(frozen=True)
class JudgedSample:
    """The row and the tar members of one sample."""

    row: Row
    clean_soft_labels: np.ndarray  # float16 [classes] or [V, classes]
    dad_soft_labels: np.ndarray
    image: bytes  # x'' as stored
    codes: np.ndarray  # uint16 [h, w]


def attack_batch(samples: list[Prepared], recipe: Recipe, models: Models, codec: Executor) -> AttackedBatch:
    """Teacher on x, attack, and x'' to the codec threads (the method's steps 1 to 4)."""
    x = to_float(models.send(torch.stack([sample.clean for sample in samples if sample.clean is not None])))
    noise = models.send(torch.stack([sample.noise for sample in samples if sample.noise is not None]))
    y = models.send(torch.tensor([sample.source.label for sample in samples]))
    with torch.no_grad():
        clean_logits = models.teacher(x)
    clean_soft_labels = _view_logits([sample.view_pixels for sample in samples], models, clean_logits)
    attacked = attack(x, y, models.teacher, models.discretizer, recipe.attack, noise)
    pixels, ready = models.fetch(to_uint8(attacked.adversarial))
    stored = [
        codec.submit(_store, pixels, i, ready, recipe.output.image, sample.views) for i, sample in enumerate(samples)
    ]
    loss = None
    if recipe.output.attacked_loss:
        with torch.no_grad():
            loss = F.cross_entropy(models.teacher(attacked.perturbed), y, reduction="none")
    return AttackedBatch(y, clean_logits, clean_soft_labels, attacked, loss, stored)


def judge_batch(batch: AttackedBatch, models: Models) -> JudgedBatch:
    """Verify and label x'' as a reader of the shard will see it (the method's steps 4 to 6)."""
    stored = [future.result() for future in batch.stored]
    seen = to_float(models.send(torch.stack([image.pixels for image in stored])))
    with torch.no_grad():
        dad_logits = models.teacher(seen).half()  # float16, as stored, so that verdict and stored logits agree
    dad_soft_labels = _view_logits([image.views for image in stored], models, dad_logits).half()
    clean_logits, clean_soft_labels, attacked = (
        batch.clean_logits.half(),
        batch.clean_soft_labels.half(),
        batch.attacked,
    )
    finite = [
        logits.isfinite().flatten(1).all(1) for logits in (clean_logits, dad_logits, clean_soft_labels, dad_soft_labels)
    ]
    columns: dict[str, torch.Tensor] = {
        "finite": torch.stack(finite).all(0),
        "good": verified(dad_logits, batch.y),
        "delta_l2": (attacked.perturbed - attacked.discrete).flatten(1).norm(dim=1),
    }
    for name, logits in (("clean", clean_logits.float()), ("dad", dad_logits.float())):
        columns[f"{name}_prob"], seen_as = logits.softmax(1).max(1)
        columns[f"{name}_pred"] = torch.where(verified(logits, batch.y), batch.y, seen_as)  # a tie counts as the label
        columns[f"loss_{name}"] = F.cross_entropy(logits, batch.y, reduction="none")
    if batch.attacked_loss is not None:
        columns["loss_attacked"] = batch.attacked_loss
    if attacked.codes.numel():
        columns["codes_changed"] = (attacked.codes != attacked.codes_discrete).flatten(1).float().mean(1)
    fetched = {name: models.fetch(column)[0] for name, column in columns.items()}
    clean, _ = models.fetch(clean_soft_labels)
    dad, _ = models.fetch(dad_soft_labels)
    codes, ready = models.fetch(attacked.codes)  # copied last: when it is complete, so are the others
    return JudgedBatch(fetched, clean, dad, codes, [image.data for image in stored], ready)


def collect(batch: JudgedBatch) -> list[JudgedSample]:
    """Wait for the verdicts of a batch; returns one judged sample per usable sample, in order."""
    batch.ready()
    values = {name: column.tolist() for name, column in batch.columns.items()}
    judged = []
    for i, data in enumerate(batch.images):
        # null, not NaN: NaN differs from itself, and equal rows must compare equal
        row: Row = {name: column[i] if math.isfinite(column[i]) else None for name, column in values.items()}
        finite, good = row.pop("finite"), row.pop("good")
        row |= {"bytes": len(data), "status": "verified", "reason": None}
        if not finite:
            row |= {"status": "error", "reason": "the teacher's logits are not finite"}
        elif not good:
            row |= {"status": "rejected", "reason": f"the teacher sees class {row['dad_pred']}"}
        codes = batch.codes[i].numpy().astype(np.uint16)
        clean, dad = batch.clean_soft_labels[i].numpy(), batch.dad_soft_labels[i].numpy()
        judged.append(JudgedSample(row, clean, dad, data, codes))
    return judged


def _view_logits(views: list[torch.Tensor | None], models: Models, canvas: torch.Tensor) -> torch.Tensor:
    """Teacher logits [B, V, classes] on B images' views, uint8 [V, 3, S, S] each; without views the canvas's logits."""
    given = [pixels for pixels in views if pixels is not None]
    if not given:
        return canvas
    with torch.no_grad():
        each = [
            models.teacher(to_float(models.send(torch.stack([pixels[v] for pixels in given]))))
            for v in range(len(given[0]))
        ]
    return torch.stack(each, dim=1)


def _store(
    images: torch.Tensor, i: int, ready: Callable[[], None], settings: ImageFormat, views: np.ndarray | None
) -> Stored:
    ready()
    data = encode_image(images[i], settings)
    pixels = decode_image(data)
    return Stored(data, pixels, None if views is None else view_images(pixels, views))
