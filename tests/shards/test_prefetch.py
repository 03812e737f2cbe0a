"""Work ahead of the model: in order, bounded, and over when nobody wants it any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from shards.prefetch import Prefetch, map_in_order


class Counted:
    """Numbers from 0 on; ``read`` is how many have been taken."""

    def __init__(self, stop: int | None = None) -> None:
        self.read = 0
        self.stop = stop
        self.closed = False

    def __iter__(self) -> Iterator[int]:
        try:
            for number in count() if self.stop is None else range(self.stop):
                self.read += 1
                yield number
        finally:
            self.closed = True


def settled(value: Callable[[], object]) -> object:
    """A value once it has stopped changing."""
    last = value()
    for _ in range(100):
        time.sleep(0.05)
        if value() == last:
            return last
        last = value()
    raise AssertionError("never settles")


def until(condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("never happens")


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_reads_a_bounded_stretch_ahead(depth: int) -> None:
    """From an endless source, at most the items taken, `depth` more and the one in hand are read."""
    source = Counted()
    items = Prefetch(source, depth)
    assert settled(lambda: source.read) == depth + 1
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert settled(lambda: source.read) == 5 + depth + 1
    items.close()


def test_ends_with_its_source() -> None:
    items = Prefetch(Counted(3), 10)
    until(lambda: items.exhausted)  # known before the consumer has taken all items
    assert list(items) == [0, 1, 2]
    assert list(Prefetch([], 1)) == []


def test_errors_arrive_in_their_place() -> None:
    """The exception of a source arrives unchanged, after the items before it."""

    def source() -> Iterator[int]:
        yield 1
        raise OSError("cable pulled")

    items = Prefetch(source(), 5)
    until(lambda: items.exhausted)
    assert next(items) == 1
    with pytest.raises(OSError, match="cable pulled"):
        next(items)


def test_close_ends_the_thread() -> None:
    """A thread that waits for room ends soon after `close`."""
    before = threading.active_count()
    source = Counted()
    items = Prefetch(source, 2)
    next(items)
    items.close()
    until(lambda: threading.active_count() <= before)
    assert source.read <= 5


def test_map_in_order_is_bounded_and_in_order() -> None:
    """Fast items do not overtake slow ones; at most `ahead` results wait, so a long source takes no memory."""
    source = Counted()
    with ThreadPoolExecutor(4) as pool:

        def square(number: int) -> int:
            time.sleep(0.005 * (number % 3))
            return number**2

        results = map_in_order(pool, square, source, 6)
        assert [next(results) for _ in range(20)] == [number**2 for number in range(20)]
        assert source.read == 20 + 6
        results.close()  # type: ignore[attr-defined]
        assert list(map_in_order(pool, square, range(5), 100)) == [0, 1, 4, 9, 16]


def test_map_in_order_raises_in_place() -> None:
    """The error of an item arrives in the place of its result; items behind it are given up."""
    done: list[int] = []

    def work(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        time.sleep(0.02)
        done.append(number)
        return number

    found = []
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="three"):
        for number in map_in_order(pool, work, range(100), 50):
            found.append(number)
    assert found == [0, 1, 2] and len(done) < 20
