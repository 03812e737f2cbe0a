"""Top-1 of a student on image sets (folders of WebDataset tars with ``.cls``), with its binomial standard error."""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from manifests import UserError
from manifests.progress import progress
from shards import iterate_tar
from shards.canvas import IMAGE_EXTENSIONS, BadImage, load_canvas
from shards.codec import to_float

from .distributed import rank, sum_over_ranks, world

RESULTS = "eval.json"
CLASSES = "classes.json"  # class names in label order, beside the image sets
BATCH = 250  # images at a time


@dataclass(frozen=True, kw_only=True)
class Score:
    """Top-1 on one set."""

    right: int
    images: int

    @property
    def top1(self) -> float:
        """In percent."""
        return 100 * self.right / self.images

    @property
    def error(self) -> float:
        """Binomial standard error of top1, in points."""
        share = self.right / self.images
        return 100 * math.sqrt(share * (1 - share) / self.images)


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
                    raise UserError(f"{tar}: sample {sample.key} has label {label}, the student knows {classes} classes")
                yield data, int(label), f"{tar}: sample {sample.key}"


def score_set(
    model: nn.Module, folder: Path, classes: int, side: int, device: torch.device, *, bf16: bool, threads: int = 1, batch: int = BATCH
) -> Score:
    """Count how often the model's top-1 is the label. The model takes [0, 1] images [B, 3, H, W]; it is put in eval mode and back.

    Several processes share the images out, and all get the score of the whole set. Raises UserError as `read_set` does, and for no images.
    """
    was_training = model.training
    model.eval()
    right = images = 0
    pending: list[tuple[torch.Tensor, int]] = []

    def flush() -> int:
        x = to_float(torch.stack([image for image, _ in pending])).to(device, memory_format=torch.channels_last)
        y = torch.tensor([label for _, label in pending], device=device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return int((model(x).argmax(1) == y).sum())

    for sample in read_set(folder, classes, side, part=rank(), parts=world(), threads=threads):
        pending.append(sample)
        images += 1
        if len(pending) == batch:
            right += flush()
            pending.clear()
    if pending:
        right += flush()
    model.train(was_training)
    right, images = sum_over_ranks(torch.tensor([right, images])).tolist()
    if images == 0:
        raise UserError(f"{folder}: its tars hold no samples")
    return Score(right=right, images=images)


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


def evaluate(
    model: nn.Module, data: Path, classes: int, side: int, device: torch.device, *, bf16: bool, threads: int = 1, label: str
) -> dict[str, Score]:
    """Score a model on every set of a data folder."""
    scores = {}
    names = sets_below(data)
    with progress(len(names), f"evaluating {label}", "set") as bar:
        for name in names:
            scores[name] = score_set(model, data / name, classes, side, device, bf16=bf16, threads=threads)
            bar.update()
    return scores


def scores_to_json(scores: Mapping[str, Score], *, made_from: str, weights: str) -> str:
    """``made_from``: fingerprint of the weights and the sets that were scored; ``weights``: sha256 of the weights alone."""
    tree = {"made_from": made_from, "weights": weights, "scores": {name: asdict(score) for name, score in scores.items()}}
    return json.dumps(tree, indent=2) + "\n"


def scores_from_json(text: bytes, **expected: str) -> dict[str, Score] | None:
    """The scores, or None when they are of another ``made_from`` or ``weights`` than expected, or unreadable: they are measured again."""
    try:
        tree = json.loads(text)
        return {name: Score(**score) for name, score in tree["scores"].items()} if expected.items() <= tree.items() else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
