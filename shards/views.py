"""Several views of one image, each with the teacher's soft label on exactly those pixels (Beyer et al., 2022: consistent teaching).

Stage 1 draws V crops of an image, labels each, and stores the crop boxes beside the logits; stage 2 replays the same crops on the same
decoded pixels with the same integer resampling (PIL), to the bit. With one view, the whole canvas (the paper's setting), nothing of this
is stored: ``KEY.logits.npy`` is then float16 [classes].

    KEY.views.npy   VIEW records [V]
    KEY.logits.npy  float16 [V, classes], or instead
    KEY.topk.npy    `topk_dtype` records [V] ([1] for the whole canvas)
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from manifests.errors import UserError
from manifests.recipe import recipe_dataclass

from .codec import array_dtype, decode_array, encode_array
from .seeds import digest, seeded_generator

VIEW = np.dtype(
    [("top", "<u2"), ("left", "<u2"), ("height", "<u2"), ("width", "<u2"), ("flip", "<u2")]
)  # pixels of the stored image
RATIO = 4 / 3  # most that a crop's sides differ by, as in Inception's random resized crop
Share = Annotated[float, Field(gt=0, le=1)]


@recipe_dataclass
class ViewSettings:
    """Which views of an image get a soft label of their own, and how the labels are stored."""

    count: Annotated[int, Field(ge=1, le=1000)] = 1
    """1: the whole canvas, as in the paper. More: random crops and flips, replayed one by one, an epoch each."""
    scale: Share = 0.25
    """Smallest area of a crop, as a share of the canvas; the largest is all of it."""
    topk: Annotated[int, Field(ge=1)] | None = None
    """Store the k largest logits and the log-sum-exp of the rest, instead of all logits. Total masses stay exact, the shape of the rest is
    lost; at T = 4 much of a zero-shot teacher's mass lies there, so that all logits (2 bytes a class) teach better:
    ``python -m shards topk RUN`` says what would be lost."""
    temperatures: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (4.0,)
    """With topk: those at which a student may learn from the soft labels."""


def draw_views(key: str, seed: int, settings: ViewSettings, side: int) -> np.ndarray | None:
    """VIEW records [count] for the sample of this key on a canvas of ``side`` pixels; None for the whole canvas alone.

    The first views do not depend on how many there are.
    """
    if settings.count == 1:
        return None
    area, shape, top, left, flip = torch.rand(
        settings.count, 5, generator=seeded_generator(seed, key, "views"), dtype=torch.float64
    ).T.numpy()
    area = settings.scale + (1 - settings.scale) * area
    aspect = np.exp((2 * shape - 1) * math.log(RATIO))
    views = np.empty(settings.count, VIEW)
    views["width"] = np.clip(np.rint(side * np.sqrt(area * aspect)), 1, side)
    views["height"] = np.clip(np.rint(side * np.sqrt(area / aspect)), 1, side)
    views["top"] = np.floor(top * (side - views["height"] + 1.0))
    views["left"] = np.floor(left * (side - views["width"] + 1.0))
    views["flip"] = flip < 0.5
    return views


def replay(pixels: np.ndarray, view: np.void, where: str = "view") -> np.ndarray:
    """One view of an image, uint8 [H, W, 3] -> the same shape: crop, resize bicubically to the full size, mirror where ``flip``.

    The same pixels and view give the same bytes on any machine. Raises UserError naming ``where`` for a box that is not inside the image.
    """
    height, width = pixels.shape[:2]
    top, left, high, wide, flip = view.item()
    if not (1 <= high <= height - top and 1 <= wide <= width - left and flip in (0, 1)):
        raise UserError(f"{where}: view {view} is not inside an image of {width} x {height} pixels")
    if (high, wide) != (height, width):
        box = (left, top, left + wide, top + high)
        pixels = np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, box=box))
    return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels


def view_images(image: torch.Tensor, views: np.ndarray) -> torch.Tensor:
    """All views of an image, uint8 [3, H, W] -> [V, 3, H, W]: what stage 1 shows the teacher."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return torch.from_numpy(np.stack([replay(pixels, view) for view in views])).permute(0, 3, 1, 2).contiguous()


def view_of_epoch(key: str, seed: int, epoch: int, count: int) -> int:
    """Which view an epoch shows: each in turn, from a start of the sample's own, so that a batch holds views of every number."""
    return (epoch + digest(seed, key, "view", size=8)) % count


def soft_label_members(logits: np.ndarray, views: np.ndarray | None, settings: ViewSettings) -> dict[str, bytes]:
    """The tar members of a sample's soft labels.

    logits: float16 [V, classes], on the views in their order; [1, classes] where ``views`` is None.
    """
    if len(logits) != (1 if views is None else len(views)):
        raise ValueError(f"{len(logits)} rows of logits for {settings.count} views")
    members = {} if views is None else {"views.npy": encode_array(views)}
    if settings.topk is not None:
        return members | {"topk.npy": encode_array(shorten(logits, settings.topk, settings.temperatures))}
    return members | {"logits.npy": encode_array(logits[0] if views is None else logits)}


def read_soft_labels(
    members: dict[str, bytes], classes: int, temperature: float | None, where: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """(logits, views) of a sample: float16 [classes] and None, or [V, classes] and VIEW records [V].

    From a top-k record the logits are float32 and stand for the teacher at ``temperature`` alone (None: the first that is stored).
    Raises UserError naming ``where``.
    """
    views = decode_array(members["views.npy"], VIEW, where) if "views.npy" in members else None
    if views is not None and (views.ndim != 1 or not len(views)):
        raise UserError(f"{where}: views of shape {views.shape}")
    if "topk.npy" in members:
        logits = _read_topk(members["topk.npy"], classes, temperature, where)
        logits = logits if views is not None or len(logits) != 1 else logits[0]
    elif "logits.npy" in members:
        logits = decode_array(members["logits.npy"], np.float16, where)
    else:
        raise UserError(f"{where}: has no .logits.npy")
    if logits.shape != ((classes,) if views is None else (len(views), classes)):
        many = "" if views is None else f" and {len(views)} views"
        raise UserError(f"{where}: logits of shape {logits.shape} for {classes} classes{many}")
    return logits, views


def topk_dtype(k: int, temperatures: int) -> np.dtype[np.void]:
    """Record of a shortened soft label: ``rest[t]`` is log sum exp(z / temperatures[t]) over the classes that are not listed."""
    return np.dtype(
        [
            ("classes", "<u2", (k,)),
            ("logits", "<f2", (k,)),
            ("temperatures", "<f4", (temperatures,)),
            ("rest", "<f4", (temperatures,)),
        ]
    )


def shorten(logits: np.ndarray, k: int, temperatures: tuple[float, ...]) -> np.ndarray:
    """float16 logits [V, classes] -> `topk_dtype` records [V]. At the given temperatures the k probabilities stay exact."""
    rows, classes = logits.shape
    if not k < classes <= 1 << 16:
        raise UserError(f"views.topk: {k} of {classes} classes; choose fewer than there are, at most 65,536")
    order = np.argsort(-logits.astype(np.float32), axis=1, kind="stable")
    records = np.empty(rows, topk_dtype(k, len(temperatures)))
    records["classes"] = order[:, :k]
    records["logits"] = np.take_along_axis(logits, order[:, :k], 1)
    records["temperatures"] = temperatures
    rest = (
        np.take_along_axis(logits.astype(np.float64), order[:, k:], 1)[:, None] / np.asarray(temperatures)[:, None]
    )  # [V, T, classes - k]
    records["rest"] = np.logaddexp.reduce(rest, axis=2)
    return records


def expand(records: np.ndarray, classes: int, temperature: float) -> np.ndarray:
    """`topk_dtype` records [V] -> float32 logits [V, classes] whose softmax at ``temperature`` has the k probabilities of the teacher.

    The rest of the mass, exact too, is spread evenly over the other classes. Raises UserError for a temperature that is not stored.
    """
    at = np.isclose(records["temperatures"], temperature, rtol=1e-6)
    if not at.any(axis=1).all():
        stored = ", ".join(f"{t:g}" for t in np.unique(records["temperatures"]))
        raise UserError(
            f"soft labels are stored for temperature {stored} only, not {temperature:g}; set loss.temperature to it"
        )
    rest = records["rest"][np.arange(len(records)), at.argmax(axis=1)]
    others = classes - records["classes"].shape[1]
    logits = np.repeat((temperature * (rest - math.log(others)))[:, None].astype(np.float32), classes, axis=1)
    np.put_along_axis(logits, records["classes"].astype(np.int64), records["logits"].astype(np.float32), 1)
    return logits


def _read_topk(data: bytes, classes: int, temperature: float | None, where: str) -> np.ndarray:
    found = array_dtype(data, where)
    if found.names != topk_dtype(1, 1).names:
        raise UserError(f"{where}: dtype {found}, expected a top-k record")
    k, temperatures = (math.prod(found[name].shape) for name in ("classes", "temperatures"))
    records = decode_array(data, topk_dtype(k, temperatures), where)
    if records.ndim != 1 or not len(records) or not k < classes or records["classes"].max() >= classes:
        raise UserError(f"{where}: a top-{k} record that does not fit {classes} classes")
    try:
        return expand(records, classes, float(records["temperatures"][0, 0]) if temperature is None else temperature)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
