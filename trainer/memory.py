"""Turn running out of memory, on the device, in the process or in a loader worker, into one line with the fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from manifests import UserError
from manifests.devices import must_fit


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn torch's errors about memory inside the block into a UserError."""
    try:
        with must_fit("a batch does not fit into memory; raise accumulate, or lower batch"):
            yield
    except RuntimeError as error:
        what = str(error).partition("\n")[0][:160]
        # torch reports a worker's death from a signal handler, anywhere in the block; a worker's own error differs
        if "DataLoader worker" in what and any(
            sign in what for sign in ("killed by signal", "exited unexpectedly", "shared memory")
        ):
            raise UserError(
                f"a loader process was killed; lower workers, or give more memory and more /dev/shm ({what})"
            ) from error
        raise
