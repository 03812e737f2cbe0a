"""Work ahead of the model, in order and bounded: an iterator read in a thread, and a function mapped by a pool."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Prefetch(Generic[T], Iterator[T]):
    """Reads an iterable in a thread of its own, at most ``depth`` items ahead. Its exceptions arrive in their place."""

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self.exhausted = False  # the thread has read all items; the consumer may not have taken them yet
        self._items = items
        self._ready: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(depth)
        self._closed = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item, error, end = self._ready.get()
        if error is not None:
            raise error
        if end:
            raise StopIteration
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Stop reading."""
        self._closed.set()

    def _read(self) -> None:
        try:
            for item in self._items:
                self._put((item, None, False))
                if self._closed.is_set():
                    return
            self.exhausted = True
            self._put((None, None, True))
        except BaseException as error:
            self.exhausted = True
            self._put((None, error, True))

    def _put(self, entry: tuple[T | None, BaseException | None, bool]) -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(entry, timeout=0.1)
            except queue.Full:
                continue


def map_in_order(pool: Executor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Apply ``function`` to every item in a pool, at most ``ahead`` items in advance. Results keep the items' order."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
