"""Memory that runs out, on the device, in the process or in a loader worker, as one line that says what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from manifests import UserError
from manifests.devices import must_fit


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns what torch raises when memory runs out inside the block into a UserError."""
    try:
        with must_fit("a batch does not fit into memory; raise accumulate, or lower batch"):
            yield
    except RuntimeError as error:
        what = str(error).partition("\n")[0][:160]
        # May be raised anywhere: torch tells a worker's death from a signal handler. What a worker raised itself reads otherwise.
        if "DataLoader worker" in what and any(
            sign in what for sign in ("killed by signal", "exited unexpectedly", "shared memory")
        ):
            raise UserError(
                f"a loader process was killed; lower workers, or give more memory and more /dev/shm ({what})"
            ) from error
        raise
