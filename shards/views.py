"""Several views of one image, each with the teacher's soft label on exactly those pixels.

This is the consistent teaching of Beyer et al. (2022). Stage 1 draws V crops of an image, labels each, and stores the
crop boxes beside the logits. Stage 2 replays the same crops on the same decoded pixels with the same integer resampling
(PIL), to the bit. With one view, the whole canvas (the paper's setting), no boxes are stored, and ``KEY.logits.npy`` is
float16 [classes].

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

# in pixels of the stored image
VIEW = np.dtype([("top", "<u2"), ("left", "<u2"), ("height", "<u2"), ("width", "<u2"), ("flip", "<u2")])
RATIO = 4 / 3  # largest aspect ratio of a crop, as in Inception's random resized crop
Share = Annotated[float, Field(gt=0, le=1)]


@recipe_dataclass
class ViewSettings:
    """Which views of an image get a soft label of their own, and the form in which labels are stored."""

    count: Annotated[int, Field(ge=1, le=1000)] = 1
    """1: the whole canvas, as in the paper. More: random crops and flips, of which each epoch replays one."""
    scale: Share = 0.25
    """Smallest area of a crop, as a share of the canvas; the largest is all of it."""
    topk: Annotated[int, Field(ge=1)] | None = None
    """Store the k largest logits and the log-sum-exp of the rest, instead of all logits. The mass of the rest stays
    exact, its shape is lost. At T = 4, much of a zero-shot teacher's mass lies in the rest, so all logits (2 bytes per
    class) teach better; ``python -m shards topk RUN`` measures the loss."""
    temperatures: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (4.0,)
    """With topk: the temperatures at which a student may learn from the soft labels."""


def draw_views(key: str, seed: int, settings: ViewSettings, side: int) -> np.ndarray | None:
    """VIEW records [count] for the sample of this key on a canvas of ``side`` pixels; None if ``count`` is 1.

    A larger ``count`` adds views and leaves the first ones as they are.
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
    """One view of an image, uint8 [H, W, 3] -> same shape: crop, resize bicubically to full size, mirror if ``flip``.

    The same pixels and view give the same bytes on any machine.
    Raises UserError naming ``where`` for a box that is not inside the image.
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
    """All views of an image, as stage 1 shows them to the teacher: uint8 [3, H, W] -> [V, 3, H, W]."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return torch.from_numpy(np.stack([replay(pixels, view) for view in views])).permute(0, 3, 1, 2).contiguous()


def view_of_epoch(key: str, seed: int, epoch: int, count: int) -> int:
    """Number of the view that an epoch shows. Each sample starts at its own number: a batch mixes all numbers."""
    return (epoch + digest(seed, key, "view", size=8)) % count


def soft_label_members(logits: np.ndarray, views: np.ndarray | None, settings: ViewSettings) -> dict[str, bytes]:
    """The tar members that hold a sample's soft labels.

    logits: float16 [V, classes], in the order of the views; [1, classes] if ``views`` is None.
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

    Logits from a top-k record are float32 and stand for the teacher at ``temperature`` alone (None: the first one
    stored). Raises UserError naming ``where``.
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
    """Record of a shortened soft label. ``rest[t]``: log sum exp(z / temperatures[t]) over the classes not listed."""
    of_classes, of_temperatures = (k,), (temperatures,)
    fields = [("classes", "<u2", of_classes), ("logits", "<f2", of_classes)]
    return np.dtype([*fields, ("temperatures", "<f4", of_temperatures), ("rest", "<f4", of_temperatures)])


def shorten(logits: np.ndarray, k: int, temperatures: tuple[float, ...]) -> np.ndarray:
    """float16 logits [V, classes] -> `topk_dtype` records [V]. The k probabilities stay exact at ``temperatures``."""
    rows, classes = logits.shape
    if not k < classes <= 1 << 16:
        raise UserError(f"views.topk: {k} of {classes} classes; choose fewer than there are, at most 65,536")
    order = np.argsort(-logits.astype(np.float32), axis=1, kind="stable")
    records = np.empty(rows, topk_dtype(k, len(temperatures)))
    records["classes"] = order[:, :k]
    records["logits"] = np.take_along_axis(logits, order[:, :k], 1)
    records["temperatures"] = temperatures
    others = np.take_along_axis(logits.astype(np.float64), order[:, k:], 1)[:, None]  # [V, 1, classes - k]
    records["rest"] = np.logaddexp.reduce(others / np.asarray(temperatures)[:, None], axis=2)
    return records


def expand(records: np.ndarray, classes: int, temperature: float) -> np.ndarray:
    """`topk_dtype` records [V] -> float32 logits [V, classes] whose softmax at ``temperature`` has the teacher's top k.

    The other classes share the rest of the mass evenly; their total is exact too.
    Raises UserError for a temperature that is not stored.
    """
    at = np.isclose(records["temperatures"], temperature, rtol=1e-6)
    if not at.any(axis=1).all():
        stored = ", ".join(f"{t:g}" for t in np.unique(records["temperatures"]))
        raise UserError(
            f"soft labels are stored for temperature {stored} only, not {temperature:g}; set method.temperature to it, "
            "or make a run whose views.temperatures hold it"
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
