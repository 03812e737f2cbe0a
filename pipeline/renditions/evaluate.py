"""The teacher's accuracy on the composed sets, on the images as they are and after discretization: the numbers of the model card."""

from __future__ import annotations

from pathlib import Path

import torch

from manifests import UserError
from manifests.progress import progress
from shards import decode_image, iterate_tar
from shards.codec import to_float
from shards.sources.classes import load_classes

from ..job.models import load_models
from ..recipe import load
from .clip import TEACHER_DIR
from .compose import EVALUATION


def evaluation_table(data: Path, batch: int = 250) -> str:
    """Markdown: set, images, top-1 on x, top-1 on Q(x), mean absolute error of Q(x)."""
    models = load_models(load("demo"), load_classes(TEACHER_DIR / "prompts.yaml"))
    lines = ["| set | images | top-1 on x | top-1 on Q(x) | mean abs. error of Q(x) |", "|---|---|---|---|---|"]
    with progress(len(EVALUATION), "evaluating", "set") as bar:
        for name in EVALUATION:
            tars = sorted((data / name).glob("*.tar"))
            if not tars:
                raise UserError(f"{data / name}: no tars; run `python -m pipeline.renditions compose` first")
            right = right_q = count = 0
            error = 0.0
            samples = [sample for tar in tars for sample in _read(tar)]
            for start in range(0, len(samples), batch):
                part = samples[start : start + batch]
                x, y = to_float(torch.stack([image for image, _ in part])), torch.tensor([label for _, label in part])
                with torch.no_grad():
                    discrete, _ = models.discretizer(x)
                    right += int((models.teacher(x).argmax(1) == y).sum())
                    right_q += int((models.teacher(discrete).argmax(1) == y).sum())
                error += float((discrete - x).abs().mean()) * len(part)
                count += len(part)
            lines.append(
                f"| {name} | {count:,} | {100 * right / count:.1f} | {100 * right_q / count:.1f} | {error / count:.4f} |"
            )
            bar.update()
    return "\n".join(lines)


def _read(tar: Path) -> list[tuple[torch.Tensor, int]]:
    with open(tar, "rb") as file:
        return [(decode_image(s.members["jpg"]), int(s.members["cls"])) for _, s in iterate_tar(file, str(tar))]
