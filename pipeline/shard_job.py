"""The per-shard job: one piece of the source in, two tars and a part file out. Pure: what comes out depends on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from manifests import RunDir
from manifests.rows import PartRecord, TarRecord, encode_part
from manifests.rundir import part_name, tar_name
from shards import TarWriter, decode_image, encode_image
from shards.canvas import BadImage, load_canvas
from shards.codec import encode_array, to_float, to_uint8

from .attack import attack, draw_noise, verified
from .classes import ClassList
from .models import Models
from .recipe import Recipe
from .sources import Piece, SourceSample

Row = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A source sample on the canvas, or why it is not."""

    source: SourceSample
    clean_bytes: bytes = b""  # as stored
    clean: torch.Tensor | None = None  # as a reader will decode it, uint8 [3, S, S]
    problem: str | None = None


def run_shard(
    shard: int, piece: Piece, recipe: Recipe, classes: ClassList, models: Models, out: RunDir, run: str, report: Callable[[list[Row]], None]
) -> list[Row]:
    """Make shard number ``shard`` and commit it: clean tar, DAD tar, and last its part file. Returns the rows.

    run: fingerprint of the run; report: called with the rows of every finished batch. Batches never cross shards.
    """
    rows: list[Row] = []
    clean_tar, dad_tar = TarWriter(), TarWriter()
    for batch in _batches(prepare(piece, recipe, classes), recipe.batch):
        new = _run_batch(batch, shard, recipe, models, clean_tar, dad_tar)
        rows.extend(new)
        report(new)
    tars = []
    for stream, tar in (("clean", clean_tar), ("dad", dad_tar)):
        data = tar.close()
        name = tar_name(stream, shard)
        out.store.write(name, data)
        tars.append(TarRecord(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest(), samples=tar.samples))
    record = PartRecord(shard=shard, source=piece.name, run=run, samples=len(rows), tars=tuple(tars))
    out.store.write(part_name(shard), encode_part(rows, record))
    return rows


def prepare(piece: Piece, recipe: Recipe, classes: ClassList) -> Iterator[Prepared]:
    """Decode, canvas, encode and decode again: step 0 of the method. Bad samples come out with their problem."""
    settings = recipe.output
    for source in piece.samples(classes):
        if source.problem is not None:
            yield Prepared(source, problem=source.problem)
            continue
        try:
            canvas = load_canvas(source.data, recipe.canvas)
        except BadImage as error:
            yield Prepared(source, problem=str(error))
            continue
        if settings.clean_images:
            data = encode_image(canvas, settings.image)
            yield Prepared(source, data, decode_image(data))
        else:
            yield Prepared(source, b"", canvas)


def _batches(samples: Iterator[Prepared], size: int) -> Iterator[list[Prepared]]:
    """Lists with ``size`` usable samples each (fewer in the last); unusable ones ride along in their place."""
    batch: list[Prepared] = []
    usable = 0
    for sample in samples:
        batch.append(sample)
        usable += sample.clean is not None
        if usable == size:
            yield batch
            batch, usable = [], 0
    if batch:
        yield batch


def _run_batch(batch: list[Prepared], shard: int, recipe: Recipe, models: Models, clean_tar: TarWriter, dad_tar: TarWriter) -> list[Row]:
    usable = [sample for sample in batch if sample.clean is not None]
    results = iter(_compute(usable, recipe, models) if usable else [])
    rows: list[Row] = []
    for sample in batch:
        row: Row = {"key": sample.source.key, "shard": shard, "label": sample.source.label}
        if sample.clean is None:
            rows.append(row | {"status": "error", "reason": sample.problem})
            continue
        result = next(results)
        row |= result.row
        if row["status"] == "error":
            rows.append(row)
            continue
        members = {"cls": str(sample.source.label).encode(), "logits.npy": encode_array(result.clean_logits)}
        if recipe.output.clean_images:
            members = {recipe.output.image.format: sample.clean_bytes} | members
        extent = clean_tar.add(sample.source.key, members)
        row |= {"clean_offset": extent.offset, "clean_size": extent.size, "clean_crc32": extent.crc32}
        if row["status"] == "verified":
            members = {recipe.output.image.format: result.image}
            members |= {"cls": str(sample.source.label).encode(), "logits.npy": encode_array(result.dad_logits)}
            if recipe.output.codes:
                members["codes.npy"] = encode_array(result.codes)
            extent = dad_tar.add(sample.source.key, members)
            row |= {"dad_offset": extent.offset, "dad_size": extent.size, "dad_crc32": extent.crc32}
        rows.append(row)
    return rows


@dataclass(frozen=True)
class _Result:
    row: Row
    clean_logits: np.ndarray  # float16 [classes]
    dad_logits: np.ndarray
    image: bytes  # x'' as stored
    codes: np.ndarray  # uint16 [h, w]


def _compute(samples: list[Prepared], recipe: Recipe, models: Models) -> Iterator[_Result]:
    """The method on one batch of usable samples (DESIGN.md, steps 1 to 6)."""
    device = models.device
    x = to_float(torch.stack([sample.clean for sample in samples if sample.clean is not None])).to(device)
    y = torch.tensor([sample.source.label for sample in samples], device=device)
    noise = draw_noise([sample.source.key for sample in samples], x.shape[1:], recipe.attack, recipe.seed).to(device)
    with torch.no_grad():
        clean_logits = models.teacher(x)
    attacked = attack(x, y, models.teacher, models.discretizer, recipe.attack, noise)
    # What is verified and labelled is the image as a reader of the shard will see it.
    stored = [encode_image(image, recipe.output.image) for image in to_uint8(attacked.adversarial).cpu()]
    seen = to_float(torch.stack([decode_image(data) for data in stored])).to(device)
    with torch.no_grad():
        dad_logits = models.teacher(seen)
        attacked_loss = F.cross_entropy(models.teacher(attacked.perturbed), y, reduction="none")
    clean_logits, dad_logits = clean_logits.half(), dad_logits.half()  # judge what is stored, not what was computed
    good = verified(dad_logits, y)
    finite = (clean_logits.isfinite() & dad_logits.isfinite()).all(1)
    clean, dad = _judge(clean_logits, y), _judge(dad_logits, y)
    codes = attacked.codes.cpu()
    changed = (attacked.codes != attacked.codes_discrete).flatten(1).float().mean(1) if codes.numel() else None
    columns = {
        "clean_pred": clean.prediction,
        "clean_prob": clean.probability,
        "dad_pred": dad.prediction,
        "dad_prob": dad.probability,
        "loss_clean": clean.loss,
        "loss_attacked": attacked_loss,
        "loss_dad": dad.loss,
        "delta_l2": (attacked.perturbed - attacked.discrete).flatten(1).norm(dim=1),
    }
    values = {name: column.tolist() for name, column in columns.items()}
    for i, data in enumerate(stored):
        row: Row = {name: column[i] for name, column in values.items()}
        row |= {"bytes": len(data), "codes_changed": None if changed is None else changed[i].item(), "status": "verified", "reason": None}
        if not finite[i]:
            row |= {"status": "error", "reason": "the teacher's logits are not finite"}
        elif not good[i]:
            row |= {"status": "rejected", "reason": f"the teacher sees class {row['dad_pred']}"}
        yield _Result(row, clean_logits[i].cpu().numpy(), dad_logits[i].cpu().numpy(), data, codes[i].numpy().astype(np.uint16))


@dataclass(frozen=True)
class _Judgement:
    prediction: torch.Tensor
    probability: torch.Tensor
    loss: torch.Tensor


def _judge(logits: torch.Tensor, y: torch.Tensor) -> _Judgement:
    probability, prediction = logits.float().softmax(1).max(1)
    return _Judgement(prediction, probability, F.cross_entropy(logits.float(), y, reduction="none"))
