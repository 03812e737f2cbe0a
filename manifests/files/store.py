"""The one place that opens paths and URLs: a directory of files, local or on an object store (s3://, gs://, …).

A file appears under its final name only when complete: locally by temporary name, fsync and rename; on an object
store by one PUT (or a multipart upload, which appears when it is completed). Listings never come from a cache: other
machines write there too.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ..errors import Unreachable, Unwritable, UserError, one_line
from ..locations import check_location
from .atomic import HOST, link, write_file

_CHUNK = 16 << 20  # bytes read at once
PAUSES = (0.5, 2.0, 8.0, None)  # seconds before an object store is asked again
FORBIDDEN = (401, 403)  # what a web server answers however often it is asked
_TEMPORARY = re.compile(r"^\.(?P<name>.+)\.(?P<host>[^.]+)\.(?P<pid>\d+)(-\d+)?\.tmp$")
_TRAILING_SLASHES = re.compile(r"(?<=[^:/])/+$")  # of "/" and "s3://" they stay
T = TypeVar("T")


class Store:
    """A directory of files under a local path or a URL of `locations.PROTOCOLS`. Names are relative, parted by ``/``.

    Raises UserError for a chained URL, another protocol, or one whose package is not installed.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = _TRAILING_SLASHES.sub("", check_location(str(url)))
        try:
            fs, self.root = _open(self.url, os.getpid())
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.url}: cannot open URLs of this kind ({error})") from error
        self.is_local = isinstance(fs, LocalFileSystem)

    @property
    def fs(self) -> Any:
        """The fsspec file system, of this process: a connection does not survive a fork."""
        return _open(self.url, os.getpid())[0]

    def __str__(self) -> str:
        return self.url

    def where(self, name: str) -> str:
        """Full path or URL of a file, for messages."""
        return f"{self.url}{'' if self.url.endswith('/') else '/'}{name}"

    def exists(self, name: str = "") -> bool:
        return self._ask(name, lambda fs, path: bool(fs.exists(path)))

    def size(self, name: str) -> int:
        """Bytes. Raises FileNotFoundError."""
        return self._ask(name, lambda fs, path: int(fs.size(path)))

    def info(self, name: str) -> dict[str, Any]:
        """What fsspec knows of a file: its size, and a version under the store's own name. Raises FileNotFoundError."""
        return self._ask(name, lambda fs, path: dict(fs.info(path)))

    def files_below(self) -> dict[str, dict[str, Any]]:
        """What fsspec says of every file here and in all folders below, by relative name, from one listing."""
        found = self._ask("", lambda fs, path: fs.find(path, detail=True))
        return {path[len(self.root) :].lstrip("/"): entry for path, entry in found.items()}

    def open(self, name: str) -> IO[bytes]:
        """A file to read from, anywhere in it. Raises FileNotFoundError."""
        return open(self._full(name), "rb") if self.is_local else io.BufferedReader(_RemoteFile(self, name), _CHUNK)

    def read(self, name: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        return self._ask(name, lambda fs, path: bytes(fs.cat_file(path)))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, or fewer at the end of the file. Local files stay open for the next read.

        Raises FileNotFoundError.
        """
        if not self.is_local:
            return self._ask(name, lambda fs, path: bytes(fs.cat_file(path, start=offset, end=offset + size)))
        path = self._full(name)
        # A file that was replaced is opened anew. Path.stat takes three times as long.
        found = os.stat(path)  # noqa: PTH116
        # keep a reference: another thread may evict this file from the cache, which closes it
        file = _descriptor(path, os.getpid(), found.st_ino, found.st_mtime_ns)
        return os.pread(file.fileno(), size, offset)

    def advise(self, name: str) -> None:
        """Tell the kernel that a whole local file will be read soon. Raises FileNotFoundError."""
        if self.is_local and hasattr(os, "posix_fadvise"):
            with self.open(name) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files directly in a folder, without temporary ones; empty if there is no such folder."""
        return sorted(self._listing(folder))

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each file directly in a folder, by name, from one listing. Links to files count.

        Files whose size a listing does not tell (http) are left out.
        """
        return {name: int(size) for name, size in self._listing(folder).items() if size is not None}

    def folders(self, folder: str) -> list[str]:
        """Sorted names of the folders directly in a folder; empty if there is no such folder."""
        return sorted(name for name, _ in self._listed(folder, "directory", os.path.isdir))

    def _listing(self, folder: str) -> dict[str, int | None]:
        files = self._listed(folder, "file", os.path.isfile)
        return {name: entry["size"] for name, entry in files if not _TEMPORARY.match(name)}

    def _listed(self, folder: str, kind: str, is_kind: Callable[[str], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, fsspec's description) of each entry of one kind. ``is_kind`` tells where local links lead."""
        with contextlib.suppress(FileNotFoundError):
            for entry in self._ask(folder, lambda fs, path: fs.ls(path, detail=True)):
                name = os.path.basename(entry["name"].rstrip("/"))
                if name and (entry["type"] == kind or (entry.get("islink") and is_kind(entry["name"]))):
                    yield name, entry

    def modified(self, name: str) -> float:
        """Time of last change by the store's clock, seconds since the epoch. Raises FileNotFoundError."""
        return self._ask(name, lambda fs, path: float(fs.modified(path).timestamp()))

    def sha256(self, name: str) -> str:
        """Reads the file in pieces. Raises FileNotFoundError."""
        digest = hashlib.sha256()
        for offset in range(0, self.size(name), _CHUNK):
            digest.update(self.read_range(name, offset, _CHUNK))
        return digest.hexdigest()

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write a file atomically, replacing any of that name.

        Raises Unwritable when the disk is full or the place is not writable; what was there before is then untouched.
        """
        with self._writing(name):
            if self.is_local:
                write_file(Path(self._full(name)), data, os.replace)
            else:
                self._ask(name, lambda fs, path: fs.pipe_file(path, data))

    def create(self, name: str, data: bytes) -> bool:
        """Write a file atomically unless there is one of that name already; returns whether this call made it.

        Of several processes on several machines one wins; on a store without conditional PUTs more than one may.
        """
        with self._writing(name):
            if self.is_local:
                return write_file(Path(self._full(name)), data, link)
            try:
                self._ask(name, lambda fs, path: fs.pipe_file(path, data, mode="create"))
            except FileExistsError:
                try:
                    return self.read(name) == data  # ours: the answer to the first request was lost
                except FileNotFoundError:  # another process made it and removed it since
                    return False
            return True

    def remove(self, name: str) -> None:
        """Remove a file; none of that name is no error."""
        with self._writing(name), contextlib.suppress(FileNotFoundError):
            self._ask(name, lambda fs, path: Path(path).unlink() if self.is_local else fs.rm_file(path))

    def check_writable(self) -> None:
        """Raises Unwritable where nothing can be written at present. Leaves nothing behind, no folder either."""
        if not self.is_local:
            probe = f".{HOST}.{os.getpid()}.probe"
            self.write(probe, b"")
            self.remove(probe)
            return
        root = Path(self.root)
        with (
            self._writing(""),
            tempfile.TemporaryFile(dir=next(path for path in (root, *root.parents) if path.exists())),
        ):
            pass

    def remove_empty(self, folder: str) -> None:
        """Remove a folder when nothing is left in it. Object stores know no folders."""
        if self.is_local:
            with contextlib.suppress(OSError):  # not empty: somebody else uses it
                Path(self._full(folder)).rmdir()

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except Unreachable as error:
            raise Unwritable(str(error)) from error
        except OSError as error:
            if not self.is_local:
                raise Unwritable(f"{self.where(name)}: cannot write here ({error}); choose another place") from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Unwritable(
                    f"{self.where(name)}: the disk is full; free some space and run the same command again "
                    "(finished shards are kept)"
                ) from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
                raise Unwritable(
                    f"{self.where(name)}: cannot write here ({error.strerror}); choose another place"
                ) from error
            raise

    def _ask(self, name: str, request: Callable[[Any, str], T]) -> T:
        """``request(file system, path)``, repeated if an object store fails, beyond what its client repeats by itself.

        Raises Unreachable, naming the URL, when it keeps failing; FileNotFoundError and FileExistsError pass.
        """
        if self.is_local:
            return request(self.fs, self._full(name))
        pauses = iter(PAUSES)
        while True:
            try:
                return request(self.fs, self._full(name))
            except (FileNotFoundError, FileExistsError):
                raise
            except Exception as error:  # every client has classes of its own for credentials, connection, permission
                pause = next(pauses)
                if pause is None or isinstance(error, PermissionError) or getattr(error, "status", None) in FORBIDDEN:
                    reason = one_line(error) or type(error).__name__
                    raise Unreachable(
                        f"{self.where(name)}: the store refuses or cannot be reached ({reason})"
                    ) from error
                time.sleep(pause)

    def remove_stale_temporaries(self) -> None:
        """Remove temporary files that dead processes of this host left here or in a folder directly below."""
        if not self.is_local or not self.exists():
            return
        for path in (*Path(self.root).glob(".*.tmp"), *Path(self.root).glob("*/.*.tmp")):
            match = _TEMPORARY.match(path.name)
            if match and match["host"] == HOST and not alive(int(match["pid"])):
                path.unlink(missing_ok=True)

    def _full(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}".rstrip("/") or "/"


class _RemoteFile(io.RawIOBase):
    """A file of an object store, read in ranges: each is asked for again when the connection breaks."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._position, self._size = 0, store.size(name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(min(len(buffer), self._size - self._position), 0)
        data = self._store.read_range(self._name, self._position, wanted) if wanted else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


@lru_cache(maxsize=256)
def _descriptor(path: str, _pid: int, _inode: int, _modified: int) -> IO[bytes]:
    """An open file, closed when it leaves the cache. The process id keeps forked loader workers from sharing one."""
    return open(path, "rb")


@lru_cache(maxsize=64)
def _open(url: str, _pid: int) -> tuple[Any, str]:
    """File system and root of a URL, for one process."""
    fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return fs, root


def alive(pid: int) -> bool:
    """Whether a process of this machine still runs. A killed one that its parent has not collected does not."""
    try:
        os.kill(pid, 0)
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].startswith(" Z")
    except ProcessLookupError:
        return False
    except (PermissionError, FileNotFoundError):  # somebody else's; or a system without /proc
        return True
