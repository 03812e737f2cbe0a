"""Image sets to score students on: folders of WebDataset tars with ``.cls``, and the class list beside them."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from manifests import UserError
from shards import iterate_tar
from shards.canvas import IMAGE_EXTENSIONS, BadImage, load_canvas

CLASSES = "classes.json"  # class names in label order, beside the image sets


def check_set(folder: Path, classes: list[str]) -> None:
    """Make sure that there is an image set, of this class list where the folder above it has a classes.json. Raises UserError."""
    set_tars(folder)
    if classes_of(folder) not in (None, classes):
        found = folder.parent / CLASSES
        raise UserError(f"{folder}: is of another class list than the shards ({found})")


def classes_of(folder: Path) -> list[str] | None:
    """Class names of an image set in label order. None: there is no classes.json beside it. Raises UserError for one that is no JSON."""
    found = folder.parent / CLASSES
    try:
        classes: list[str] | None = json.loads(found.read_text()) if found.exists() else None
    except ValueError as error:
        raise UserError(f"{found}: not a list of class names in JSON ({error}); correct it, or remove it") from error
    return classes


def set_tars(folder: Path) -> list[Path]:
    """The tars of an image set. Raises UserError when there are none."""
    _refuse_url(folder)
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"{folder}: no image set here (no *.tar; `make renditions` composes the demo's)")
    return tars


def _refuse_url(folder: Path) -> None:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(folder)):  # what Path has left of s3://
        raise UserError(f"{folder}: image sets are local folders, not URLs; copy them to a disk first")


def read_set(
    folder: Path, classes: int, side: int, *, part: int = 0, parts: int = 1, threads: int = 1
) -> Iterator[tuple[torch.Tensor, int]]:
    """(uint8 image [3, side, side], label) of every sample below a folder, in order; images are resized and cropped as stage 1 does.

    Of several parts, number ``part`` is every parts-th sample. Images are decoded in ``threads`` (PIL lets go of the interpreter), some
    ahead of the one that is asked for.

    Raises UserError for a folder without tars, a sample without image or label, an unreadable image, or a label outside the class list.
    """
    ahead: deque[tuple[Future[torch.Tensor], int]] = deque()
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for data, label, where in _stored(folder, classes, part, parts):
            ahead.append((pool.submit(_decode, data, side, where), label))
            if len(ahead) > 4 * max(threads, 1):
                image, its_label = ahead.popleft()
                yield image.result(), its_label
        for image, its_label in ahead:
            yield image.result(), its_label


def _decode(data: bytes, side: int, where: str) -> torch.Tensor:
    try:
        return load_canvas(data, side)
    except BadImage as error:
        raise UserError(f"{where}: {error}") from error


def _stored(folder: Path, classes: int, part: int, parts: int) -> Iterator[tuple[bytes, int, str]]:
    """(encoded image, label, name for messages) of every sample of a part."""
    count = 0
    for tar in set_tars(folder):
        with open(tar, "rb") as file:
            for _, sample in iterate_tar(file, str(tar)):
                count += 1
                if (count - 1) % parts != part:
                    continue
                data = sample.first(IMAGE_EXTENSIONS)
                label = sample.members.get("cls", b"").decode("ascii", "replace").strip()
                if data is None or not label.isdecimal():
                    raise UserError(f"{tar}: sample {sample.key} has no image, or no .cls with a number")
                if int(label) >= classes:
                    raise UserError(
                        f"{tar}: sample {sample.key} has label {label}, the student knows {classes} classes"
                    )
                yield data, int(label), f"{tar}: sample {sample.key}"


def sets_below(data: Path) -> list[str]:
    """Names of the evaluation sets of a data folder: every sub-folder with tars but ``train``; val and v2 first."""
    _refuse_url(data)
    if not data.is_dir():
        raise UserError(f"{data}: no such folder; `make renditions` composes the demo's sets")
    names = [path.name for path in data.iterdir() if path.name != "train" and any(path.glob("*.tar"))]
    if not names:
        raise UserError(f"{data}: holds no evaluation sets (sub-folders of *.tar)")
    first = {name: i for i, name in enumerate(("val", "v2"))}
    return sorted(names, key=lambda name: (first.get(name, 2), name))
