"""Which sample comes when: exact epochs as pure functions."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch

from shards import seeded_generator
from shards.epochs.plan import classes_in_windows, cut, plan_epoch

SIZES = (9, 12, 0, 7, 11, 1, 14, 5)  # samples of each shard; one has none
SHARDS = np.repeat(np.arange(len(SIZES)), SIZES)


def order(
    epoch: int = 0, seed: int = 0, window: int = 3, stream: str = "clean", shards: np.ndarray = SHARDS
) -> np.ndarray:
    return plan_epoch(shards, seed=seed, epoch=epoch, window=window, stream=stream).order


@pytest.mark.parametrize("window", [1, 2, 3, 16])
@pytest.mark.parametrize("epoch", range(3))
def test_a_permutation(window: int, epoch: int) -> None:
    """An epoch holds every sample exactly once."""
    found = order(epoch=epoch, window=window)
    assert found.dtype == np.int64 and sorted(found) == list(range(len(SHARDS)))


def test_deterministic_and_different() -> None:
    """Equal (seed, epoch, window, stream) give equal orders; changing any of the four changes the order."""
    first = order()
    assert np.array_equal(first, order())
    for other in (order(epoch=1), order(seed=1), order(window=2), order(stream="dad")):
        assert not np.array_equal(first, other)


def test_the_global_random_state_does_not_matter() -> None:
    np.random.seed(0)
    first = order()
    np.random.seed(1)
    torch.manual_seed(1)
    assert np.array_equal(first, order())


@pytest.mark.parametrize("window", [1, 2, 3, 5, 16])
def test_windows(window: int) -> None:
    """A window holds all samples of at most ``window`` shards and no others: a reader needs only these tars."""
    filled = sum(size > 0 for size in SIZES)
    for epoch in range(5):
        visited = SHARDS[order(epoch=epoch, window=window)]
        seen: set[int] = set()
        at = 0
        while at < len(visited):
            # a window ends after all samples of its shards
            now: list[int] = []
            end = at
            for first in range(at, len(visited)):
                if visited[first] not in now:
                    if len(now) == window:
                        break
                    now.append(int(visited[first]))
                end = first + 1
            assert end - at == sum(SIZES[shard] for shard in now) and not seen & set(now)
            seen |= set(now)
            at = end
        assert len(seen) == filled


def test_shards_mix_within_a_window() -> None:
    """With one window over everything, neighbours rarely come from one shard, and any sample may come first or last."""
    visited = np.stack([SHARDS[order(epoch=epoch, window=16)] for epoch in range(50)])
    same = (visited[:, 1:] == visited[:, :-1]).mean()
    assert same < 0.3  # drawn at random: sum (n_i / N)^2 = 0.18
    places = np.stack([np.argsort(order(epoch=epoch, window=16)) for epoch in range(400)])
    assert abs(places.mean(0) - (len(SHARDS) - 1) / 2).max() < 5 * len(SHARDS) / np.sqrt(12 * 400)


def test_shards_are_permuted() -> None:
    """With windows of one shard, the order of the shards changes from epoch to epoch."""
    firsts = {int(SHARDS[order(epoch=epoch, window=1)][0]) for epoch in range(60)}
    assert firsts == {shard for shard, size in enumerate(SIZES) if size}


def test_numbers_of_shards_may_have_gaps() -> None:
    """Only the grouping into shards counts, not their numbers. No samples give an empty order."""
    assert np.array_equal(order(shards=SHARDS * 10 + 7), order())
    assert order(shards=np.empty(0, np.int32)).tolist() == []
    assert order(shards=np.zeros(4, np.int32)).shape == (4,)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [0, 1, 7, 64])
def test_ranks_share_a_batch(size: int, world: int) -> None:
    """The parts of all ranks follow each other, cover the batch, and differ by at most one sample."""
    parts = [cut(100, 100 + size, rank, world) for rank in range(world)]
    assert parts[0][0] == 100 and parts[-1][1] == 100 + size
    assert all(before[1] == after[0] for before, after in pairwise(parts))
    lengths = [end - begin for begin, end in parts]
    assert max(lengths) - min(lengths) <= 1


def test_seeded_generator() -> None:
    """Equal values give equal numbers in every process; changing one value changes the number."""
    assert torch.equal(
        torch.rand(5, generator=seeded_generator("a", 1)), torch.rand(5, generator=seeded_generator("a", 1))
    )
    expected = int.from_bytes(hashlib.sha256(b"attack 3 key").digest()[:8], "little") >> 1
    assert seeded_generator("attack", 3, "key").initial_seed() == expected
    seeds = {seeded_generator("attack", seed, f"k{n}").initial_seed() for seed in range(10) for n in range(100)}
    assert len(seeds) == 1000


@pytest.mark.parametrize(
    ("classes", "shards", "size"), [(1000, 200, 100), (100, 60, 30), (10, 50, 2), (5, 5, 10), (2, 40, 4), (3, 4, 1)]
)
def test_classes_in_windows(classes: int, shards: int, size: int) -> None:
    """Shuffled samples show as many classes as expected, however small the set; sorted ones those of the windows."""
    of = np.repeat(np.arange(shards), size)
    labels = np.random.default_rng(0).integers(0, classes, len(of))
    for window in (1, 4, 16):
        found, expected = classes_in_windows(of, labels, window=window)
        assert 0.6 * expected < found < 1.5 * expected
    ordered = np.sort(labels)
    found, _ = classes_in_windows(of, ordered, window=4)
    plan = plan_epoch(of, seed=0, epoch=0, window=4, stream="clean")
    planned = [len(np.unique(ordered[part])) for part in np.split(plan.order, plan.ends[:-1])]
    assert min(planned) <= found <= max(planned)
