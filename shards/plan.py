"""Which sample comes when: exact epochs planned from the manifest. Pure functions of (seed, epoch, window).

Permute the shards; take them in windows of a few; permute the samples inside each window; cut that one global order into global
batches. The order does not depend on the number of workers or ranks.
"""

from __future__ import annotations

import hashlib

import numpy as np


def epoch_order(shards: np.ndarray, *, seed: int, epoch: int, window: int, stream: str) -> np.ndarray:
    """The order in which an epoch visits samples.

    shards: [N] shard number of each sample, non-decreasing. Returns a permutation of ``arange(N)``, int64.
    Every stream ("clean", "dad") has an order of its own.
    """
    digest = hashlib.sha256(f"{seed} {epoch} {stream}".encode()).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    starts = np.flatnonzero(np.diff(shards, prepend=-1))
    ends = np.append(starts[1:], len(shards))
    visit = rng.permutation(len(starts))
    pieces = []
    for first in range(0, len(visit), window):
        together = [np.arange(starts[s], ends[s]) for s in visit[first : first + window]]
        pieces.append(rng.permutation(np.concatenate(together)))
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def rank_slice(begin: int, end: int, rank: int, world: int) -> tuple[int, int]:
    """The part of a global batch that belongs to one rank; the parts of all ranks differ by at most one sample."""
    size = end - begin
    return begin + size * rank // world, begin + size * (rank + 1) // world
