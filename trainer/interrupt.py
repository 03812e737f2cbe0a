"""Being told to stop: the step that is under way is finished first, so that a checkpoint of all that was learned can be written."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from manifests.command import SIGNALS


@dataclass
class Stop:
    """Whether this process has been told to stop."""

    asked: bool = False


@contextmanager
def told_to_stop(*, quiet: bool = False) -> Iterator[Stop]:
    """Inside the block the first of `SIGNALS` only sets ``asked``; the next does what it does outside. quiet: say nothing about it."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # where Python sets no handlers
        yield stop
        return
    before, owner = {number: signal.getsignal(number) for number in SIGNALS}, os.getpid()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(_number: int, _frame: object) -> None:
        if os.getpid() != owner:
            return  # a loader process, told together with this one: the step under way may need its batch
        restore()
        stop.asked = True
        if not quiet:
            os.write(2, b"\nstopping after this step; once more to stop at once\n")  # print may not be called while it is printing

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()
