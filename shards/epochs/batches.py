"""Batches as a trainer receives them, and the memory in which a loader worker builds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import get_worker_info

from manifests import UserError

from .plan import cut

Transform = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


@dataclass
class StreamBatch:
    """One rank's part of a global batch of one stream."""

    keys: list[str]
    images: torch.Tensor  # uint8 [B, 3, H, W] as stored (the view of this epoch), or what the transform made of it
    labels: torch.Tensor  # int64 [B]
    logits: torch.Tensor  # float16 [B, classes], on this epoch's view; float32 where the run stores the top k only
    partner: torch.Tensor | None = None  # as logits, on the clean images of the same keys
    more: torch.Tensor | None = None  # uint8 [copies - 1, B, 3, H, W]: further augmented copies

    def pin_memory(self) -> StreamBatch:
        """Copy to page-locked memory, from which a GPU copies while it computes; the loader calls this in a thread."""
        return StreamBatch(
            keys=self.keys,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            logits=self.logits.pin_memory(),
            partner=None if self.partner is None else self.partner.pin_memory(),
            more=None if self.more is None else self.more.pin_memory(),
        )

    def cut(self, part: int, parts: int) -> StreamBatch:
        """Part ``part`` of ``parts``, which differ by at most one sample. The part shares the memory of the whole."""
        place = slice(*cut(0, len(self.keys), part, parts))
        return StreamBatch(
            keys=self.keys[place],
            images=self.images[place],
            labels=self.labels[place],
            logits=self.logits[place],
            partner=None if self.partner is None else self.partner[place],
            more=None if self.more is None else self.more[:, place],
        )


Batch = dict[str, StreamBatch]  # by stream name


class BatchBuilder:
    """Collects the samples of one `StreamBatch`. Pixels are written straight to their place in one piece of memory.

    size: samples of the batch. copies: images of each sample.
    """

    def __init__(self, size: int, copies: int) -> None:
        self.size, self.copies = size, copies
        self._keys: list[str] = []
        self._labels: list[int] = []
        self._logits: list[np.ndarray] = []
        self._partners: list[np.ndarray] = []
        self._images = torch.empty(0)
        self._room = np.empty((0, 0, 0, 0, 0), np.uint8)

    def add(
        self,
        key: str,
        label: int,
        logits: np.ndarray,
        images: Sequence[np.ndarray],
        partner: np.ndarray | None,
        where: str,
    ) -> None:
        """Add one sample. images: ``copies`` times uint8 [H, W, 3]. where: tar and key.

        Raises UserError naming ``where`` for an image of another size than those before it.
        """
        place = len(self._keys)
        if place == 0:
            self._images = _empty(self.copies, self.size, *images[0].shape)
            self._room = self._images.numpy()
        for number, pixels in enumerate(images):
            if pixels.shape != self._room.shape[2:]:
                height, width = pixels.shape[:2]
                raise UserError(f"{where}: image of {width} x {height} pixels among others of {self._room.shape[3]}")
            self._room[number, place] = pixels
        self._keys.append(key)
        self._labels.append(label)
        self._logits.append(logits)
        if partner is not None:
            self._partners.append(partner)

    def batch(self) -> StreamBatch:
        """The batch of all samples. Images stay channels_last, as decoders deliver them."""
        images = self._images.permute(0, 1, 4, 2, 3)
        return StreamBatch(
            keys=self._keys,
            images=images[0],
            labels=torch.tensor(self._labels),
            logits=torch.from_numpy(np.stack(self._logits)),
            partner=torch.from_numpy(np.stack(self._partners)) if self._partners else None,
            more=images[1:] if self.copies > 1 else None,
        )


def _empty(*shape: int) -> torch.Tensor:
    """uint8. A loader worker takes shared memory, which reaches the trainer without another copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own default_collate does
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]
