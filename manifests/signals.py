"""Signals: which ones ask for an end, finishing a step before obeying, and loader processes that outlive a broadcast."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR1,
)  # they ask for an end; SIGUSR1: Slurm's warning with `--signal=B:USR1`


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
            os.write(
                2, b"\nstopping after this step; once more to stop at once\n"
            )  # print may not be called while it is printing

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()


@contextmanager
def sigterm_blocked() -> Iterator[None]:
    """Block SIGTERM inside the block. Processes that are forked there are born with it blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_sigterm_unless_from_parent(_worker: int) -> None:
    """In a loader process: ignore SIGTERM unless the parent sent it, or is gone.

    torchrun and Slurm send SIGTERM to all processes of a job, but a trainer that stops still needs batches for its last step.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def obey() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent and os.getppid() == parent:
            pass
        os._exit(0)

    threading.Thread(target=obey, daemon=True).start()
