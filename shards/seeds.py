"""Randomness that depends on what, never on when or where: seeds come from text such as "run seed, sample key"."""

from __future__ import annotations

import hashlib

import torch


def seeded_generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by any values: equal values give equal numbers, whatever the process, the worker or the order."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
