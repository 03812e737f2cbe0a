"""Signals: which ones ask a process to stop, how it finishes its step first, and how loader processes ignore them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# ask a process to stop; SIGUSR1 is Slurm's warning with `--signal=B:USR1`
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass
class Stop:
    """Whether a signal has asked this process to stop."""

    asked: bool = False


@contextmanager
def told_to_stop(*, quiet: bool = False) -> Iterator[Stop]:
    """Inside the block the first of `SIGNALS` only sets ``asked``; the second acts as outside. quiet: print nothing."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers in the main thread only
        yield stop
        return
    before, owner = {number: signal.getsignal(number) for number in SIGNALS}, os.getpid()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(_number: int, _frame: object) -> None:
        if os.getpid() != owner:
            return  # a loader process got the signal too, and the step under way may need its batch
        restore()
        stop.asked = True
        if not quiet:
            # not print: the signal may have interrupted one, and print is not reentrant
            os.write(2, b"\nstopping after this step; once more to stop at once\n")

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()


@contextmanager
def sigterm_blocked() -> Iterator[None]:
    """Block SIGTERM inside the block. Processes forked there inherit the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_sigterm_unless_from_parent(_worker: int) -> None:
    """In a loader process: ignore SIGTERM unless the parent sent it, or is gone.

    torchrun and Slurm send SIGTERM to all processes of a job, but a trainer that stops still needs batches for its
    last step.
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
