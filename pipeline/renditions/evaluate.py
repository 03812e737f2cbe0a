"""The teacher's accuracy on the composed sets, on the images and on their discretizations: the model card's numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from manifests import UserError
from manifests.progress import progress
from shards.codec import to_float
from shards.sources import ImageSet, load_classes, open_set

from ..job.models import load_models
from ..method.attack import verified
from ..recipe import load
from .clip import TEACHER_DIR
from .compose import EVALUATION


def evaluation_table(data: str, batch: int = 250) -> str:
    """Markdown: set, images, top-1 on x and on Q(x), mean absolute error of Q(x). data: folder or URL of the sets."""
    recipe, classes = load("demo"), load_classes(TEACHER_DIR / "prompts.yaml")
    models = load_models(recipe, classes)
    lines = ["| set | images | top-1 on x | top-1 on Q(x) | mean abs. error of Q(x) |", "|---|---|---|---|---|"]
    with progress(len(EVALUATION), "evaluating", "set") as bar:
        for name in EVALUATION:
            right = right_q = count = 0
            error = 0.0
            for x, y in _batches(open_set(f"{data}/{name}", classes), recipe.canvas, batch):
                with torch.no_grad():
                    discrete, _ = models.discretizer(x)
                    right += int(verified(models.teacher(x), y).sum())
                    right_q += int(verified(models.teacher(discrete), y).sum())
                error += float((discrete - x).abs().mean()) * len(x)
                count += len(x)
            top1, top1_q = 100 * right / count, 100 * right_q / count
            lines.append(f"| {name} | {count:,} | {top1:.1f} | {top1_q:.1f} | {error / count:.4f} |")
            bar.update()
    return "\n".join(lines)


def _batches(images: ImageSet, side: int, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(x [B, 3, side, side] in [0, 1], labels [B]). Raises UserError for an unusable image: the demo has none."""
    images.check()
    pictures = images.pictures(side)
    while some := list(itertools.islice(pictures, batch)):
        found = [picture.image for picture in some if picture.image is not None]
        if problem := next((picture.problem for picture in some if picture.problem), None):
            raise UserError(f"{images.where}: {problem}; compose the set anew")
        yield to_float(torch.stack(found)), torch.tensor([picture.label for picture in some])
