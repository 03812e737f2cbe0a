"""Top-1 of a student on image sets, with its binomial standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from manifests.notes import note
from manifests.progress import progress
from shards.codec import to_float
from shards.sources import ImageSet

from ..ranks.distributed import gather, is_first, rank, sum_over_ranks, world
from .sets import image_set, set_in, sets_below

BATCH = 250  # images at a time


@dataclass(frozen=True, kw_only=True)
class Score:
    """Top-1 on one set."""

    right: int
    images: int  # that could be read
    left_out: int = 0  # samples that could not, at most `MAX_ERRORS` of all

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
    images: ImageSet,
    side: int,
    device: torch.device,
    *,
    bf16: bool,
    threads: int = 1,
    batch: int = BATCH,
) -> Score:
    """Count how often the label has the largest logit, in eval mode. The model takes [0, 1] images [B, 3, H, W]. A tie
    with the label counts as right, as in verification.

    Several processes share the images out, and all get the score of the whole set. Unusable samples are left out, and
    a note names the first. Raises UserError for too many of them, for a set without images, and as
    `ImageSet.pictures` does.
    """
    was_training = model.training
    model.eval()
    right = seen = bad = 0
    first: str | None = None
    pending: list[tuple[torch.Tensor, int]] = []

    def flush() -> int:
        x = to_float(torch.stack([image for image, _ in pending])).to(device, memory_format=torch.channels_last)
        y = torch.tensor([label for _, label in pending], device=device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(x)
            return int((logits.gather(1, y[:, None])[:, 0] == logits.amax(1)).sum())

    for picture in images.pictures(side, part=rank(), parts=world(), threads=threads):
        if picture.image is None:
            bad, first = bad + 1, first or picture.problem
            continue
        pending.append((picture.image, picture.label))
        seen += 1
        if len(pending) == batch:
            right += flush()
            pending.clear()
    if pending:
        right += flush()
    model.train(was_training)
    right, seen, bad = sum_over_ranks(torch.tensor([right, seen, bad])).tolist()
    images.refuse_empty(seen + bad)
    if bad:
        problem = next(found for found in gather(first) if found is not None)
        images.refuse_many(problem, bad, seen + bad)
        if is_first():
            note(f"{images.describe(problem, bad, seen + bad)}; the score leaves them out")
    return Score(right=right, images=seen, left_out=bad)


def evaluate(
    model: nn.Module,
    data: str | Path,
    classes: Sequence[str],
    side: int,
    device: torch.device,
    *,
    bf16: bool,
    threads: int = 1,
    label: str,
) -> dict[str, Score]:
    """Score a model on every set in a data folder, after a check of them all. classes: names, in label order."""
    sets = {name: image_set(set_in(data, name), classes) for name in sets_below(data)}
    for images in sets.values():
        images.check()
    scores = {}
    with progress(len(sets), f"evaluating {label}", "set") as bar:
        for name, images in sets.items():
            scores[name] = score_set(model, images, side, device, bf16=bf16, threads=threads)
            bar.update()
    return scores
