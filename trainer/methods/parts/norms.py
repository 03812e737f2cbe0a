"""Several sets of batch norms in one student (AdvProp: Xie et al., 2020). They share all other weights.

The sets are modules of the student, so optimizer, DDP, the moving average and checkpoints include them on their own.
Exports leave them out: see `without_auxiliary`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

# a child of each batch norm holds its further sets; its name is part of their weights' names
AUXILIARY = "auxiliary_norms"


def add_norms(model: nn.Module, sets: int) -> None:
    """Give every batch norm ``sets`` - 1 further sets of weights and statistics, as copies of its own.

    Models without batch norms, such as ViTs, do not change.
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
    """Make the model use set ``number`` of its batch norms inside the block. Set 0 is exported."""
    norms = [module for module in model.modules() if AUXILIARY in module._modules] if number else []
    for norm in norms:
        norm.chosen = number  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm in norms:
            norm.chosen = 0  # type: ignore[assignment]


def without_auxiliary(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove the further sets of batch norms from a state dict, which leaves that of the plain model."""
    return {name: value for name, value in state.items() if AUXILIARY not in name.split(".")}


@cache
def _switched(kind: type[nn.Module]) -> Any:
    """A subclass of a batch norm class that passes its input to the set that `through` chose."""

    class Switched(kind):  # type: ignore[valid-type, misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.chosen:
                further: nn.ModuleList = getattr(self, AUXILIARY)
                x = further[self.chosen - 1](x)
                return x
            return super().forward(x)

    Switched.__name__ = Switched.__qualname__ = kind.__name__
    return Switched
