"""Folders of things that can be made or fetched again, on this machine's disk, shared by all its processes."""

from __future__ import annotations

import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import Unwritable, UserError


def cache_folder(kind: str) -> Path:
    """The folder of one kind of things: below ``$DAD_CACHE``, else ``$XDG_CACHE_HOME/dad``, else ``~/.cache/dad``.

    Raises UserError for a user who has none of them, or a folder that everybody may write to: what it holds is trusted.
    """
    folder = _base() / kind
    for place in (folder, folder.parent):
        if _open_to_all(place):
            raise UserError(f"{place}: everybody may write to this cache; chmod o-w it, or set DAD_CACHE to another")
    return folder


def _open_to_all(place: Path) -> bool:
    """Whether everybody may change what a folder holds; of a sticky one, such as /tmp, only what others own there."""
    try:
        found = place.stat()
        if not found.st_mode & stat.S_IWOTH:
            return False
        return not found.st_mode & stat.S_ISVTX or any(path.stat().st_uid != os.getuid() for path in place.iterdir())
    except OSError:
        return False


def _base() -> Path:
    if own := os.environ.get("DAD_CACHE"):
        return Path(own)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "dad"
    try:
        return Path.home() / ".cache" / "dad"
    except RuntimeError as error:
        raise UserError(
            "this user has no home folder to keep a cache in; set DAD_CACHE to a folder on a local disk"
        ) from error


@contextmanager
def writing_cache(folder: Path) -> Iterator[None]:
    """Turn disk errors in a cache folder into one line: Unwritable names the folder and the setting that moves it."""
    try:
        yield
    except (OSError, Unwritable) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        reason = (isinstance(cause, OSError) and cause.strerror) or error
        mend = "free some space, lower cache_gb, or set DAD_CACHE (environment) to a folder on another local disk"
        raise Unwritable(f"{folder}: cannot keep a cache here ({reason}); {mend}") from error


_open: set[int] = set()  # lock files that threads of this process hold or wait for
_forking = threading.Lock()  # no fork between opening or closing a file and noting it above


def _close_in_child() -> None:
    """A forked child inherits the open lock files; unless it closes them, the parent can never release the locks."""
    for file in _open:
        os.close(file)
    _open.clear()
    _forking.release()


os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_close_in_child)


@contextmanager
def lock(folder: Path, name: str) -> Iterator[None]:
    """Hold a lock of this machine; the kernel releases it when the holder dies. Raises Unwritable."""
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
