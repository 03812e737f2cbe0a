"""Students: any timm model over the run's classes, with its normalisation inside, so that it takes [0, 1] images."""

from __future__ import annotations

import timm
import torch
from torch import nn

from manifests import UserError
from manifests.recipe import nearest


class Student(nn.Module):
    """A timm model behind its own normalisation: images [B, 3, H, W] in [0, 1] -> logits [B, classes]."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model((images - self.mean) / self.std)
        return logits


def create_student(name: str, classes: int, side: int) -> Student:
    """Build a student with random weights for images of ``side`` pixels. Raises UserError for a name that timm does not know."""
    if not timm.is_model(name):
        raise UserError(f"student: timm knows no model {name!r}{nearest(name, timm.list_models())}")
    config = timm.get_pretrained_cfg(name)
    fixed = config is not None and config.fixed_input_size  # ViT and the like are built for one image size
    try:
        model = timm.create_model(name, num_classes=classes, **({"img_size": side} if fixed else {}))
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"student: {name} cannot be built for {side} x {side} images: {' '.join(str(error).split())[:160]}") from error
    settings = timm.data.resolve_data_config(model=model)
    return Student(model, settings["mean"], settings["std"])
