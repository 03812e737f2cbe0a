"""The optimizer, from timm, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from manifests import UserError, one_line, recipe_dataclass
from manifests.recipe import Share, nearest

FUSED = ("adam", "adamw", "sgd", "momentum")  # torch has fused versions of these; AdamW is 3.5x faster on CPU


@recipe_dataclass
class Optimizer:
    """Any optimizer that timm knows, with a cosine schedule after a linear warm-up."""

    name: str = "adamw"
    """timm's name: sgd (with Nesterov momentum), momentum (without), adamw, lamb …"""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Weight decay; biases and normalisation layers get none."""
    momentum: Share = 0.9
    """Momentum, for optimizers that have it, such as sgd."""
    warmup: Annotated[float, Field(ge=0)] = 0.5
    """Epochs of linear warm-up."""
    clip: Annotated[float, Field(gt=0)] | None = 5.0
    """Largest gradient norm. None: no clipping (timm's lamb still clips at 1)."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Learning rate of a layer, as a fraction of the next layer's rate (fine-tuning). None: one rate for all."""


def create_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """timm's optimizer over a timm model, which says which weights do not decay and what its layers are.

    Raises UserError for an optimizer that timm does not know, or that does not work here with these settings.
    """
    import timm.optim  # not at the top: recipes hold an `Optimizer`, and reading a recipe must be quick

    known = timm.optim.list_optimizers()
    if settings.name.lower() not in known:
        raise UserError(f"optimizer.name: timm knows no optimizer {settings.name!r}{nearest(settings.name, known)}")
    fused = {"fused": True} if settings.name.lower() in FUSED else {}
    if timm.optim.get_optimizer_info(settings.name.lower()).second_order:
        raise UserError(
            f"optimizer.name: {settings.name} needs second derivatives, which are not computed; choose another"
        )
    try:
        optimizer: torch.optim.Optimizer = timm.optim.create_optimizer_v2(
            model,
            opt=settings.name,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            layer_decay=settings.layer_decay,
            **fused,
        )
    except (AssertionError, ImportError, ValueError) as error:  # some of timm's optimizers need apex or bitsandbytes
        raise UserError(
            f"optimizer.name: {settings.name} does not work here: {one_line(error)}; choose another, or other settings"
        ) from error
    return optimizer


def learning_rate(step: int, *, peak: float, warmup: int, total: int) -> float:
    """The rate at a step: linear up to ``peak`` over ``warmup`` steps, then half a cosine down to 0 at ``total``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
