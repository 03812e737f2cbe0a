"""SIGTERM in loader processes: launchers send it to all processes of a job, but a trainer that stops still needs batches."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def not_to_be_ended() -> Iterator[None]:
    """SIGTERM waits: processes that are forked inside the block are born with it blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_the_parent_alone(_worker: int) -> None:
    """Of a loader process: SIGTERM from anyone but its parent is not obeyed, as long as it has one.

    torchrun and Slurm send it to all processes of a job, and the trainer needs batches to finish its step with.
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
