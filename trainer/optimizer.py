"""The optimizer, from timm, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from manifests import UserError, recipe_dataclass
from manifests.recipe import Share, nearest

FUSED = ("adam", "adamw", "sgd", "momentum")  # of torch, in one pass over the weights: AdamW is 3.5x faster on CPU


@recipe_dataclass
class Optimizer:
    """Any optimizer that timm knows, with a cosine schedule after a linear warm-up."""

    name: str = "adamw"
    """timm's name: sgd (with Nesterov momentum), momentum (without), adamw, lamb …"""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Not applied to biases and normalisation layers."""
    momentum: Share = 0.9
    """Of sgd."""
    warmup: Annotated[float, Field(ge=0)] = 0.5
    """Epochs of linear warm-up."""
    clip: Annotated[float, Field(gt=0)] | None = 5.0
    """Largest gradient norm; None: no clipping, but for lamb's own, in timm, at 1."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Each layer's learning rate is this times that of the layer above it (fine-tuning); None: one rate for all."""


def create_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """timm's optimizer of that name over a timm model, whose own lists say what takes no weight decay and which layer is which.

    Raises UserError for a name that timm does not know, or that does not work here.
    """
    import timm.optim  # not at the top: recipes hold an `Optimizer`, and a command line need not wait for timm

    if settings.name.lower() not in timm.optim.list_optimizers():
        raise UserError(
            f"optimizer.name: timm knows no optimizer {settings.name!r}{nearest(settings.name, timm.optim.list_optimizers())}"
        )
    fused = {"fused": True} if settings.name.lower() in FUSED else {}
    if timm.optim.get_optimizer_info(settings.name.lower()).second_order:
        raise UserError(
            f"optimizer.name: {settings.name} wants second derivatives, which training does not take; choose another"
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
    except (
        AssertionError,
        ImportError,
        ValueError,
    ) as error:  # also of apex and bitsandbytes, which some of timm's take theirs from
        raise UserError(f"optimizer.name: {settings.name} does not work here: {error}") from error
    return optimizer


def learning_rate(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Linear up to ``peak`` over ``warmup`` steps, then half a cosine down to 0 at ``total``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
