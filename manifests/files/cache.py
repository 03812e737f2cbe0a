"""Where things are kept that can be made or fetched again, on the disk of this machine, shared by all its processes."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import Unwritable, UserError


def cache_folder(kind: str) -> Path:
    """The folder of one kind of kept things: below ``$DAD_CACHE``, else ``$XDG_CACHE_HOME/dad``, else ``~/.cache/dad``.

    Raises UserError for a user who has none of them.
    """
    if own := os.environ.get("DAD_CACHE"):
        return Path(own) / kind
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "dad" / kind
    try:
        return Path.home() / ".cache" / "dad" / kind
    except RuntimeError as error:
        raise UserError(
            "this user has no home folder to keep a cache in; set DAD_CACHE to a folder on a local disk"
        ) from error


@contextmanager
def writing_cache(folder: Path) -> Iterator[None]:
    """Turn what the disk of a cache folder refuses into one line. Raises Unwritable naming the folder and what moves it."""
    try:
        yield
    except (OSError, Unwritable) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        reason = (isinstance(cause, OSError) and cause.strerror) or error
        mend = "free some space, lower cache_gb, or set the environment variable DAD_CACHE to a folder on another local disk"
        raise Unwritable(f"{folder}: cannot keep a cache here ({reason}); {mend}") from error


_open: set[int] = set()  # files of locks that threads of this process hold or wait for
_forking = threading.Lock()  # no fork between the opening or closing of one and its entry above


def _close_in_child() -> None:
    """A forked process shares its parent's open files, and with them their locks, which the parent could not let go of any more."""
    for file in _open:
        os.close(file)
    _open.clear()
    _forking.release()


os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_close_in_child)


@contextmanager
def lock(folder: Path, name: str) -> Iterator[None]:
    """One holder on this machine. The kernel lets go when the holder dies. Raises Unwritable where the folder cannot hold locks."""
    with writing_cache(folder), _forking:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        _open.add(file)
    try:
        with writing_cache(folder):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        with _forking:
            if file in _open:
                _open.remove(file)
                os.close(file)
