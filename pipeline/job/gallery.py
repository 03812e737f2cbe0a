"""The contact sheet of a run: x | Q(x) | x'' | amplified difference, with the teacher's verdict under each image."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from shards import decode_image, encode_image
from shards.codec import to_float, to_uint8
from shards.sources import Piece
from shards.sources.classes import ClassList

from ..method.attack import attack, draw_noise
from ..recipe import Recipe
from .models import Models
from .prepare import prepare

VERIFIED, REJECTED = 8, 4  # most samples of each kind on the sheet
AMPLIFY = 4
HEADINGS = ("clean x", "discretized Q(x)", "adversarial x″", f"{AMPLIFY} × (x″ − Q(x))")


@dataclass(frozen=True)
class _Panel:
    """One sample of the sheet."""

    label: str
    pictures: list[np.ndarray]  # [H, W, 3] uint8, one per heading
    verdicts: list[tuple[str, float]]  # the teacher's top-1 and its probability, for the first three pictures
    rejected: bool


def make_gallery(table: pa.Table, piece: Piece, recipe: Recipe, classes: ClassList, models: Models) -> bytes:
    """Attack a few samples of a piece again and draw a PNG. Rejected ones are marked, unreadable ones left out."""
    status = _choose(table.slice(0, piece.count))
    samples = {
        s.source.key: s for s in prepare(piece, recipe, classes) if s.clean is not None and s.source.key in status
    }
    chosen = [samples[key] for key in status if key in samples]
    if not chosen:
        return _draw([])
    x = to_float(torch.stack([s.clean for s in chosen if s.clean is not None])).to(models.device)
    y = torch.tensor([s.source.label for s in chosen], device=models.device)
    noise = draw_noise([s.source.key for s in chosen], x.shape[1:], recipe.attack, recipe.seed).to(models.device)
    made = attack(x, y, models.teacher, models.discretizer, recipe.attack, noise)
    stored = torch.stack(
        [decode_image(encode_image(image, recipe.output.image)) for image in to_uint8(made.adversarial).cpu()]
    )
    columns = [x, made.discrete, to_float(stored).to(models.device)]
    captions = []
    with torch.no_grad():
        for images in columns:
            probability, prediction = models.teacher(images).softmax(1).max(1)
            captions.append(
                [(classes.names[c], p) for c, p in zip(prediction.tolist(), probability.tolist(), strict=True)]
            )
    difference = (0.5 + AMPLIFY * (columns[2] - columns[1])).clamp(0, 1)
    panels = []
    for i, sample in enumerate(chosen):
        pictures = [to_uint8(images[i]).permute(1, 2, 0).cpu().numpy() for images in (*columns, difference)]
        label = classes.names[int(y[i])]
        panels.append(
            _Panel(label, pictures, [column[i] for column in captions], status[sample.source.key] == "rejected")
        )
    return _draw(panels)


def _choose(table: pa.Table) -> dict[str, str]:
    """Keys of verified and rejected samples, spread over the piece, with their status."""
    status = dict(zip(table.column("key").to_pylist(), table.column("status").to_pylist(), strict=True))
    keys: list[str] = []
    for wanted, count in (("verified", VERIFIED), ("rejected", REJECTED)):
        found = [key for key, s in status.items() if s == wanted]
        keys += found[:: max(len(found) // count, 1)][:count]
    return {key: status[key] for key in keys}


def _draw(panels: list[_Panel]) -> bytes:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    half = max((len(panels) + 1) // 2, 1)
    height = 1.9 * half + 0.5
    figure = Figure(figsize=(15.5, height), dpi=80)
    axes = figure.subplots(half, 9, squeeze=False, gridspec_kw={"width_ratios": [1] * 4 + [0.25] + [1] * 4})
    for axis in axes.flat:
        axis.set_axis_off()
    for n, panel in enumerate(panels):
        row, left = n % half, 5 * (n // half)
        for column, picture in enumerate(panel.pictures):
            axis = axes[row, left + column]
            axis.imshow(picture, interpolation="nearest")
            if row == 0:
                axis.set_title(HEADINGS[column], fontsize=11)
            caption, colour = f"label: {panel.label}", "grey"
            if column < len(panel.verdicts):
                name, probability = panel.verdicts[column]
                caption, colour = f"{name} {probability:.0%}", "black" if name == panel.label else "crimson"
            if column == 2 and panel.rejected:
                tall, wide = picture.shape[:2]
                axis.add_patch(
                    Rectangle((-0.5, -0.5), wide, tall, fill=False, edgecolor="crimson", linewidth=5, clip_on=False)
                )
            # parse_math: a class name with dollar signs is no formula
            place = {"transform": axis.transAxes, "ha": "center", "va": "top", "parse_math": False}
            axis.text(0.5, -0.06, caption, fontsize=9, color=colour, **place)
    margins = {"top": 1 - 0.35 / height, "bottom": 0.25 / height}
    figure.subplots_adjust(left=0.01, right=0.99, wspace=0.05, hspace=0.22, **margins)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
