"""The frozen models of a run, for methods that use them in every step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from manifests import RunInfo, UserError
from manifests.command import as_overrides
from manifests.recipe import flatten

Frozen = Callable[[torch.Tensor], Any]


def load_frozen(
    info: RunInfo, names: Collection[str], device: torch.device, models: Mapping[Any, Any] | None = None
) -> dict[str, Frozen]:
    """Load the models that a method needs, on the device, without gradient: see `Step.frozen`.

    models: `Recipe.models`, fields that override those in run.json, because files may be elsewhere on this machine.
    Raises UserError for an unknown field, or files that do not exist.
    """
    ask = {"teacher": without_gradient, "discretizer": as_quantizer}
    return {name: ask[name](load_model(info, name, device, models or {})) for name in sorted(names)}


def load_model(info: RunInfo, name: str, device: torch.device, models: Mapping[Any, Any]) -> nn.Module:
    """Load ``teacher`` or ``discretizer`` in eval mode on the device. Raises UserError as `load_frozen` does."""
    from pipeline.method.discretizer import discretizer_of_run
    from pipeline.method.teacher import teacher_of_run

    load: Callable[..., nn.Module] = {"teacher": teacher_of_run, "discretizer": discretizer_of_run}[name]
    overrides = as_overrides({field: value for field, value in flatten(models).items() if field.startswith(f"{name}.")})
    try:
        return to_frozen(load(info, overrides), device)
    except UserError as error:
        raise UserError(f"{error} (the field is in run.json; override it with --set models.{name}.…)") from error


def check_side(frozen: Mapping[str, Frozen], side: int, device: torch.device) -> None:
    """Raises UserError when the discretizer returns images of another size than ``side`` pixels."""
    if "discretizer" in frozen:
        made = frozen["discretizer"](torch.zeros(1, 3, side, side, device=device))[0].shape[-1]
        if made != side:
            raise UserError(f"input: {side}: the run's discretizer makes {made} pixels of it; set input={made}")


def to_frozen(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to the device, in eval mode and in the layout channels_last, as training images are."""
    return model.eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def without_gradient(teacher: nn.Module) -> Frozen:
    """A teacher as a function: images [B, 3, H, W] in [0, 1] -> logits [B, classes] float32."""

    def ask(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = teacher(x.contiguous(memory_format=torch.channels_last))
        return logits.float()

    return ask


def as_quantizer(discretizer: nn.Module) -> Frozen:
    """A discretizer as a function: images [B, 3, H, W] in [0, 1] -> (images float32, codes)."""

    def ask(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            images, codes = discretizer(x.contiguous(memory_format=torch.channels_last))
        return images.float(), codes

    return ask
