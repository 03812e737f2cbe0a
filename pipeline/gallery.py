"""The contact sheet of a run: clean | Q(x) | x'' | amplified difference, with the teacher's verdict under each image."""

from __future__ import annotations

import io

import pyarrow as pa
import torch

from shards import decode_image, encode_image
from shards.codec import to_float, to_uint8

from .attack import attack, draw_noise
from .classes import ClassList
from .models import Models
from .recipe import Recipe
from .shard_job import prepare
from .sources import Piece

GALLERY = "gallery.png"
VERIFIED, REJECTED = 8, 4  # rows of the sheet, when there are so many
AMPLIFY = 4


def make_gallery(table: pa.Table, piece: Piece, recipe: Recipe, classes: ClassList, models: Models) -> bytes:
    """PNG of a few samples of the first piece, attacked again; rejected ones are marked."""
    keys = _choose(table.slice(0, piece.count))
    samples = {s.source.key: s for s in prepare(piece, recipe, classes) if s.clean is not None and s.source.key in keys}
    chosen = [samples[key] for key in keys if key in samples]
    if not chosen:
        return _draw([], [])
    x = to_float(torch.stack([s.clean for s in chosen if s.clean is not None])).to(models.device)
    y = torch.tensor([s.source.label for s in chosen], device=models.device)
    noise = draw_noise([s.source.key for s in chosen], x.shape[1:], recipe.attack, recipe.seed).to(models.device)
    made = attack(x, y, models.teacher, models.discretizer, recipe.attack, noise)
    stored = torch.stack([decode_image(encode_image(image, recipe.output.image)) for image in to_uint8(made.adversarial).cpu()])
    columns = [x, made.discrete, to_float(stored).to(models.device)]
    captions = []
    with torch.no_grad():
        for images in columns:
            probability, prediction = models.teacher(images).softmax(1).max(1)
            captions.append([(classes.names[c], p) for c, p in zip(prediction.tolist(), probability.tolist(), strict=True)])
    difference = (0.5 + AMPLIFY * (columns[2] - columns[1])).clamp(0, 1)
    rows = []
    for i, sample in enumerate(chosen):
        label = classes.names[sample.source.label or 0]
        pictures = [to_uint8(images[i]).permute(1, 2, 0).cpu().numpy() for images in (*columns, difference)]
        rows.append((label, pictures, [column[i] for column in captions]))
    return _draw(rows, ["clean x", "discretized Q(x)", "adversarial x″", f"{AMPLIFY} × (x″ − Q(x))"])


def _choose(table: pa.Table) -> list[str]:
    """Keys of verified and rejected samples, spread over the piece."""
    keys: list[str] = []
    for status, count in (("verified", VERIFIED), ("rejected", REJECTED)):
        found = [key for key, s in zip(table.column("key").to_pylist(), table.column("status").to_pylist(), strict=True) if s == status]
        keys += found[:: max(len(found) // count, 1)][:count]
    return keys


def _draw(rows: list, headings: list[str]) -> bytes:  # type: ignore[type-arg]
    from matplotlib.figure import Figure

    half = (len(rows) + 1) // 2
    figure = Figure(figsize=(15.5, 1.9 * max(half, 1) + 0.5), dpi=80)
    axes = figure.subplots(max(half, 1), 9, squeeze=False, gridspec_kw={"width_ratios": [1] * 4 + [0.25] + [1] * 4})
    for axis in axes.flat:
        axis.set_axis_off()
    for n, (label, pictures, verdicts) in enumerate(rows):
        row, left = n % half, 5 * (n // half)
        for column, picture in enumerate(pictures):
            axis = axes[row, left + column]
            axis.imshow(picture, interpolation="nearest")
            if row == 0:
                axis.set_title(headings[column], fontsize=11)
            if column < 3:
                name, probability = verdicts[column]
                wrong = name != label
                mark = "REJECTED: " if wrong and column == 2 else ""
                text = f"{mark}{name} {probability:.0%}"
                axis.text(
                    0.5, -0.06, text, transform=axis.transAxes, ha="center", va="top", fontsize=9, color="crimson" if wrong else "black"
                )
            else:
                axis.text(0.5, -0.06, f"label: {label}", transform=axis.transAxes, ha="center", va="top", fontsize=9, color="grey")
    figure.subplots_adjust(
        left=0.01, right=0.99, top=1 - 0.35 / figure.get_figheight(), bottom=0.25 / figure.get_figheight(), wspace=0.05, hspace=0.22
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
