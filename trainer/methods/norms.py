"""Several sets of batch norms in one student (AdvProp: Xie et al., 2020): every other weight is shared.

The sets live inside the student, so that optimizer, DDP, the moving average and checkpoints hold them without knowing of them.
What is exported leaves them out: see `without_auxiliary`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

AUXILIARY = (
    "auxiliary_norms"  # the child of each batch norm that holds its further sets, and so a part of their weights' names
)


def add_norms(model: nn.Module, sets: int) -> None:
    """Give every batch norm of a model ``sets`` - 1 further sets of weights and statistics, equal to its own at first.

    A model without batch norms, such as a ViT, stays as it is.
    """
    if sets < 2:
        return
    for norm in [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]:
        further = nn.ModuleList(copy.deepcopy(norm) for _ in range(sets - 1))
        norm.__class__ = _switched(type(norm))  # type: ignore[arg-type]
        norm.chosen = 0  # type: ignore[assignment]
        norm.add_module(AUXILIARY, further)


@contextmanager
def through(model: nn.Module, number: int) -> Iterator[None]:
    """Inside the block the model computes with set ``number`` of its batch norms; 0 is the one that is exported."""
    norms = [module for module in model.modules() if AUXILIARY in module._modules] if number else []
    for norm in norms:
        norm.chosen = number  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm in norms:
            norm.chosen = 0  # type: ignore[assignment]


def without_auxiliary(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict without the further sets of batch norms: that of the plain model."""
    return {name: value for name, value in state.items() if AUXILIARY not in name.split(".")}


@cache
def _switched(kind: type[nn.Module]) -> Any:
    """A batch norm class that hands its input to one of its further sets where `through` says so."""

    class Switched(kind):  # type: ignore[valid-type, misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.chosen:
                further: nn.ModuleList = getattr(self, AUXILIARY)
                x = further[self.chosen - 1](x)
                return x
            return super().forward(x)

    Switched.__name__ = Switched.__qualname__ = kind.__name__
    return Switched
