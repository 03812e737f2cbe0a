"""Randomness that depends on what, never on when or where: seeds come from text such as "run seed, sample key"."""

from __future__ import annotations

import hashlib

import torch


def digest(*parts: object, size: int) -> int:
    """A number of ``size`` bytes (at most 32) that any values give: the same in every process, and on every machine."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:size], "little")


def seeded_generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by any values: equal values give equal numbers, whatever the process, the worker or the order."""
    return torch.Generator().manual_seed(digest(*parts, size=8) >> 1)
