"""Which sample comes when: exact epochs planned from the manifest. Pure functions of (seed, epoch, window).

Permute the shards; take them in windows of a few; permute the samples inside each window; cut that one global order
into global batches. The order does not depend on the number of workers or ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..seeds import digest

WINDOWS_LOOKED_AT = 8  # whose classes are counted; together some ten thousand samples


@dataclass(frozen=True)
class EpochPlan:
    """The order in which an epoch visits the samples of a stream, and which shards it needs when."""

    order: np.ndarray  # int64 [N], a permutation
    windows: tuple[np.ndarray, ...]  # shard numbers of each window
    ends: np.ndarray  # int64 [windows], position in ``order`` behind each window

    def window_at(self, position: int) -> int:
        """Number of the window that holds a position of the order."""
        return int(np.searchsorted(self.ends, position, side="right"))


def plan_epoch(shards: np.ndarray, *, seed: int, epoch: int, window: int, stream: str) -> EpochPlan:
    """Plan one epoch. Every stream ("clean", "dad") has an order of its own.

    shards: [N] shard number of each sample, non-decreasing.
    """
    rng = np.random.Generator(np.random.PCG64(digest(seed, epoch, stream, size=16)))
    starts = np.flatnonzero(np.diff(shards, prepend=-1))
    ends = np.append(starts[1:], len(shards))
    visit = rng.permutation(len(starts))
    windows = [visit[first : first + window] for first in range(0, len(visit), window)]
    order, begin = np.empty(len(shards), np.int64), 0
    marks = []
    for together in windows:
        samples = np.concatenate([np.arange(starts[s], ends[s]) for s in together])
        marks.append(begin + len(samples))
        order[begin : marks[-1]] = rng.permutation(samples)
        begin = marks[-1]
    return EpochPlan(
        order, tuple(np.asarray(shards)[starts[together]] for together in windows), np.array(marks, np.int64)
    )


def classes_in_windows(shards: np.ndarray, labels: np.ndarray, *, window: int) -> tuple[float, float]:
    """(classes in a window of shards, classes to expect in as many samples drawn at random): medians of some windows.

    The first is far below the second if the source is sorted by class: batches then hold few classes.

    shards, labels: [N], of each sample; shards non-decreasing.
    """
    starts = np.flatnonzero(np.diff(shards, prepend=-1))
    ends = np.append(starts[1:], len(shards))
    visit = np.random.Generator(np.random.PCG64(0)).permutation(len(starts))
    windows = [visit[first : first + window] for first in range(0, len(visit), window)][:WINDOWS_LOOKED_AT]
    _, counts = np.unique(labels, return_counts=True)
    # log P(a sample is of another class); 1e-9 keeps it finite if there is only one class
    absent = np.log1p(-counts / counts.sum() * (1 - 1e-9))
    found = [len(np.unique(np.concatenate([labels[starts[s] : ends[s]] for s in together]))) for together in windows]
    sizes = [int((ends - starts)[together].sum()) for together in windows]
    return float(np.median(found)), float(np.median([-np.expm1(size * absent).sum() for size in sizes]))


def cut(begin: int, end: int, part: int, parts: int) -> tuple[int, int]:
    """(begin, end) of one part of a stretch, such as a rank's part of a batch. Parts differ by at most one sample."""
    size = end - begin
    return begin + size * part // parts, begin + size * (part + 1) // parts
