"""Top-1 of a student on image sets (folders of WebDataset tars with ``.cls``), with its binomial standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from manifests import UserError
from manifests.progress import progress
from shards.codec import to_float

from ..ranks.distributed import rank, sum_over_ranks, world
from .sets import read_set, sets_below

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


def score_set(
    model: nn.Module,
    folder: Path,
    classes: int,
    side: int,
    device: torch.device,
    *,
    bf16: bool,
    threads: int = 1,
    batch: int = BATCH,
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


def evaluate(
    model: nn.Module,
    data: Path,
    classes: int,
    side: int,
    device: torch.device,
    *,
    bf16: bool,
    threads: int = 1,
    label: str,
) -> dict[str, Score]:
    """Score a model on every set of a data folder."""
    scores = {}
    names = sets_below(data)
    with progress(len(names), f"evaluating {label}", "set") as bar:
        for name in names:
            scores[name] = score_set(model, data / name, classes, side, device, bf16=bf16, threads=threads)
            bar.update()
    return scores
