"""Sets of batch norms."""

from __future__ import annotations

import copy

from torch import nn


def with_auxiliary_norms(student: nn.Module) -> nn.Module:
    """The same student with batch norms of its own: every other weight is shared, so that training either trains both (AdvProp)."""
    norms = [module for module in student.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    own = {id(weight) for norm in norms for weight in norm.parameters()}
    shared = {id(weight): weight for weight in student.parameters() if id(weight) not in own}
    return copy.deepcopy(student, memo=dict(shared))
