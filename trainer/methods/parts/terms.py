"""What losses take and give: the images of a stream, and a summand of the loss sample by sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from shards.dataset import StreamName

from ...images.mixing import Mixing


@dataclass(frozen=True)
class Images:
    """One stream's samples in a step, on the device."""

    x: torch.Tensor  # [B, 3, H, W] in [0, 1], augmented and mixed
    labels: torch.Tensor  # int64 [B]
    logits: torch.Tensor  # [B, classes], stored logits of the teacher on this stream's images
    stream: StreamName = "clean"
    mixing: Mixing | None = None  # how `x` was blended; blend labels and soft labels alike
    partner: torch.Tensor | None = None  # [B, classes], the teacher's logits on the clean image with the same key
    copies: tuple[torch.Tensor, ...] = ()  # further augmented copies, each like `x`

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Term:
    """One summand of a loss, with a value per sample, so that parts of a batch and ranks add up exactly."""

    values: torch.Tensor  # [B] float32
    stream: StreamName  # the stream whose number of samples in the global batch divides the sum
    weight: float = 1.0

    def __rmul__(self, factor: float) -> Term:
        return replace(self, weight=factor * self.weight)

    def mean(self, totals: Mapping[str, int]) -> torch.Tensor:
        """Sum of the values here, unweighted, divided by the samples of the stream in the global batch."""
        return self.values.sum() / totals[self.stream]
