"""The one place that opens paths and URLs: a directory of files, local or on anything fsspec knows (s3://, gs://, memory://).

A file appears under its final name only when complete: locally by temporary name, fsync and rename; on an object store by
one PUT.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
from functools import lru_cache
from pathlib import Path
from typing import IO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from .errors import UserError

_CHUNK = 4 << 20
_TEMPORARY = re.compile(r"^\.(?P<name>.+)\.(?P<host>[^.]+)\.(?P<pid>\d+)\.tmp$")
_HOST = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname()) or "host"


class Store:
    """A directory of files under a local path or an fsspec URL. Names are relative, with ``/`` between parts."""

    def __init__(self, url: str | Path) -> None:
        self.url = str(url).rstrip("/")
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.url}: cannot open URLs of this kind ({error})") from error
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def __str__(self) -> str:
        return self.url

    def where(self, name: str) -> str:
        """Full path or URL of a file, for messages."""
        return f"{self.url}/{name}"

    def exists(self, name: str = "") -> bool:
        return bool(self.fs.exists(self._full(name)))

    def size(self, name: str) -> int:
        """Bytes. Raises FileNotFoundError."""
        return int(self.fs.size(self._full(name)))

    def open(self, name: str) -> IO[bytes]:
        file: IO[bytes] = self.fs.open(self._full(name), "rb")
        return file

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, or fewer at the end of the file. Local files stay open for the next read.

        Raises FileNotFoundError.
        """
        if not self.is_local:
            data: bytes = self.fs.cat_file(self._full(name), start=offset, end=offset + size)
            return data
        path = self._full(name)
        found = Path(path).stat()  # a file that was replaced is opened anew
        return os.pread(_descriptor(path, os.getpid(), found.st_ino, found.st_mtime_ns).fileno(), size, offset)

    def advise(self, name: str) -> None:
        """Tell the kernel that a whole local file will be read soon. Raises FileNotFoundError."""
        if self.is_local and hasattr(os, "posix_fadvise"):
            with self.open(name) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files directly in a folder, without temporary ones; empty if there is no such folder."""
        if not self.exists(folder):
            return []
        found = (os.path.basename(path) for path in self.fs.ls(self._full(folder), detail=False))
        return sorted(name for name in found if not _TEMPORARY.match(name))

    def modified(self, name: str) -> float:
        """Time of last change, seconds since the epoch."""
        return float(self.fs.modified(self._full(name)).timestamp())

    def sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with self.open(name) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically, replacing any of that name.

        Raises UserError when the disk is full or the place is not writable; what was there before is then untouched.
        """
        try:
            if self.is_local:
                _write_local(Path(self._full(name)), data)
            else:
                self.fs.pipe_file(self._full(name), data)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"{self.where(name)}: the disk is full; free some space and run the same command again (finished shards are kept)"
                ) from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
                raise UserError(f"{self.where(name)}: cannot write here ({error.strerror}); choose another place") from error
            raise

    def remove_stale_temporaries(self) -> None:
        """Remove temporary files that dead processes of this host left behind."""
        if not self.is_local or not self.exists():
            return
        for path in Path(self.root).rglob(".*.tmp"):
            match = _TEMPORARY.match(path.name)
            if match and match["host"] == _HOST and not _alive(int(match["pid"])):
                path.unlink(missing_ok=True)

    def _full(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")


@lru_cache(maxsize=256)
def _descriptor(path: str, _pid: int, _inode: int, _modified: int) -> IO[bytes]:
    """An open file; the process id keeps forked loader workers from sharing one. Closed when it falls out of the cache."""
    return open(path, "rb")


def _write_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{_HOST}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
