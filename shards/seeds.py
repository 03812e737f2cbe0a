"""Random numbers that depend on their purpose, never on time or place: a seed is text such as "run seed, key"."""

from __future__ import annotations

import hashlib

import torch


def digest(*parts: object, size: int) -> int:
    """Hash any values to a number of ``size`` bytes (at most 32), the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:size], "little")


def seeded_generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by any values: equal values give equal numbers in every process, worker and order."""
    return torch.Generator().manual_seed(digest(*parts, size=8) >> 1)
