"""Top-1 of a student on image sets (folders of WebDataset tars with ``.cls``), with its binomial standard error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from manifests import UserError
from manifests.progress import progress
from shards import decode_image, iterate_tar
from shards.codec import EXTENSIONS, to_float

RESULTS = "eval.json"


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


def read_set(folder: Path, classes: int) -> Iterator[tuple[torch.Tensor, int]]:
    """(uint8 image [3, H, W], label) of every sample below a folder, in order.

    Raises UserError for a folder without tars, a sample without image or label, or a label outside the class list.
    """
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"{folder}: no image set here (no *.tar); `make renditions` composes the demo's")
    for tar in tars:
        with open(tar, "rb") as file:
            for _, sample in iterate_tar(file, str(tar)):
                data = next((sample.members[ext] for ext in EXTENSIONS if ext in sample.members), None)
                if data is None or "cls" not in sample.members:
                    raise UserError(f"{tar}: sample {sample.key} has no image or no .cls")
                label = int(sample.members["cls"])
                if not 0 <= label < classes:
                    raise UserError(f"{tar}: sample {sample.key} has label {label}, the student knows {classes} classes")
                yield decode_image(data, f"{tar}: {sample.key}"), label


def score_set(model: nn.Module, folder: Path, classes: int, device: torch.device, *, bf16: bool, batch: int = 250) -> Score:
    """Count how often the model's top-1 is the label. The model takes [0, 1] images [B, 3, H, W]; it is put in eval mode and back."""
    was_training = model.training
    model.eval()
    right = images = 0
    pending: list[tuple[torch.Tensor, int]] = []

    def flush() -> int:
        x = to_float(torch.stack([image for image, _ in pending])).to(device, memory_format=torch.channels_last)
        y = torch.tensor([label for _, label in pending], device=device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return int((model(x).argmax(1) == y).sum())

    for sample in read_set(folder, classes):
        pending.append(sample)
        images += 1
        if len(pending) == batch:
            right += flush()
            pending.clear()
    if pending:
        right += flush()
    model.train(was_training)
    return Score(right=right, images=images)


def sets_below(data: Path) -> list[str]:
    """Names of the evaluation sets of a data folder: every sub-folder with tars but ``train``; val and v2 first."""
    if not data.is_dir():
        raise UserError(f"{data}: no such folder; `make renditions` composes the demo's sets")
    names = [path.name for path in data.iterdir() if path.name != "train" and any(path.glob("*.tar"))]
    if not names:
        raise UserError(f"{data}: holds no evaluation sets (sub-folders of *.tar)")
    first = {name: i for i, name in enumerate(("val", "v2"))}
    return sorted(names, key=lambda name: (first.get(name, 2), name))


def evaluate(model: nn.Module, data: Path, classes: int, device: torch.device, *, bf16: bool, label: str) -> dict[str, Score]:
    """Score a model on every set of a data folder."""
    scores = {}
    names = sets_below(data)
    with progress(len(names), f"evaluating {label}", "set") as bar:
        for name in names:
            scores[name] = score_set(model, data / name, classes, device, bf16=bf16)
            bar.update()
    return scores


def scores_to_json(scores: dict[str, Score]) -> str:
    return json.dumps({name: asdict(score) for name, score in scores.items()}, indent=2) + "\n"


def scores_from_json(text: str) -> dict[str, Score]:
    return {name: Score(**score) for name, score in json.loads(text).items()}
